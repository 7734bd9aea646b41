//! Spans and metrics at a receiver that decodes them with the official protobuf definitions, by
//! `examples/tracing.toml`.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
};

use base64::Engine as _;
use serde_json::Value;

use crate::{echo::Echo, example::Example, http2};

/// The example of the specification.
const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

struct Receiver {
    process: Child,
    port: u16,
    file: PathBuf,
    _directory: tempfile::TempDir,
}

impl Receiver {
    fn start() -> Self {
        let environment = xtask::python::venv("otlp", &["opentelemetry-proto==1.45.2"]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("received");
        let script = xtask::host::workspace_root().join("gateway/tests/it/otlp_receiver.py");
        let mut process = Command::new(environment.join("bin/python"))
            .arg(script)
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        Self {
            process,
            port: line.trim().parse().unwrap(),
            file,
            _directory: directory,
        }
    }

    fn messages(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        // The last line may be half written.
        let whole = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        whole.collect()
    }

    fn spans(&self) -> Vec<Value> {
        let mut spans = Vec::new();
        for message in self.messages() {
            for resource in list(&message, "resourceSpans") {
                for scope in list(&resource, "scopeSpans") {
                    spans.extend(list(&scope, "spans"));
                }
            }
        }
        spans
    }

    fn refuse(&self, refuse: bool) {
        let flag = self.file.with_extension("refuse");
        if refuse {
            std::fs::write(flag, "").unwrap();
        } else {
            std::fs::remove_file(flag).unwrap();
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn list(value: &Value, key: &str) -> Vec<Value> {
    value[key].as_array().cloned().unwrap_or_default()
}

/// Bytes are base64 in protobuf's JSON.
fn hex(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .unwrap();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(span: &Value, key: &str) -> Option<String> {
    let attributes = list(span, "attributes");
    let found = attributes
        .iter()
        .find(|attribute| attribute["key"] == key)?;
    let value = found["value"].as_object()?.values().next()?;
    Some(
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned),
    )
}

fn start(receiver: &Receiver, origins: &[Echo; 2], lane: &str) -> Example {
    let path = xtask::host::workspace_root().join("gateway/examples/tracing.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let text = text
        .replace("127.0.0.1:4318", &format!("127.0.0.1:{}", receiver.port))
        .replace(
            "state_dir = \"state\"",
            &format!("state_dir = \"state\"\nlane = \"{lane}\""),
        );
    Example::run(&text, &origins.each_ref().map(|origin| origin.address))
}

/// Status and what the service said it got.
fn ask_http2(gateway: &Example, path: &str, headers: &[(&str, &str)]) -> (u16, Value) {
    http2::run(async {
        let client = http2::client(gateway.address).await;
        let mut request = http::Request::builder().uri(format!("http://shop.example{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut client = client.ready().await.unwrap();
        let request = request.body(()).unwrap();
        let (response, _) = client.send_request(request, true).unwrap();
        let response = response.await.unwrap();
        let status = response.status().as_u16();
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        while let Some(data) = body.data().await {
            bytes.extend_from_slice(&data.unwrap());
        }
        (status, serde_json::from_slice(&bytes).unwrap())
    })
}

#[test]
fn a_callers_trace_goes_on_through_every_attempt_on_the_lean_lane() {
    a_callers_trace_goes_on_through_every_attempt("auto", false);
}

#[test]
fn a_callers_trace_goes_on_through_every_attempt_on_the_full_lane() {
    a_callers_trace_goes_on_through_every_attempt("full", false);
}

#[test]
fn a_callers_trace_goes_on_through_every_attempt_of_http2_on_the_lean_lane() {
    a_callers_trace_goes_on_through_every_attempt("auto", true);
}

#[test]
fn a_callers_trace_goes_on_through_every_attempt_of_http2_on_the_full_lane() {
    a_callers_trace_goes_on_through_every_attempt("full", true);
}

fn a_callers_trace_goes_on_through_every_attempt(lane: &str, http2: bool) {
    let receiver = Receiver::start();
    let origins = ["one", "two"].map(Echo::start);
    let gateway = start(&receiver, &origins, lane);
    // Both attempts fail: each has a span of its own, and a status.
    for origin in &origins {
        origin.mood.status.store(503, Ordering::SeqCst);
    }
    let headers = [
        ("traceparent", GIVEN),
        ("tracestate", "vendor=1"),
        ("x-tenant", "acme"),
    ];
    let target = "/orders/1?secret=2";
    let (status, said) = if http2 {
        ask_http2(&gateway, target, &headers)
    } else {
        let answer = gateway.get("shop.example", target, &headers);
        (answer.status, answer.json())
    };
    assert_eq!(status, 503);
    let forwarded = said["headers"].clone();
    gateway.wait_for("spans", || receiver.spans().len() >= 3);
    let spans = receiver.spans();
    assert_eq!(spans.len(), 3, "{spans:#?}");
    for span in &spans {
        assert_eq!(hex(&span["traceId"]), TRACE);
        assert_eq!(span["traceState"], "vendor=1");
    }
    let kind =
        |kind: &str| -> Vec<&Value> { spans.iter().filter(|span| span["kind"] == kind).collect() };
    let request = kind("SPAN_KIND_SERVER")[0];
    assert_eq!(hex(&request["parentSpanId"]), CALLER);
    assert_eq!(request["name"], "GET shop");
    assert_eq!(request["status"]["code"], "STATUS_CODE_ERROR");
    for (key, value) in [
        ("http.route", "shop"),
        ("edgemeter.tenant", "acme"),
        ("edgemeter.service", "commerce"),
        ("http.response.status_code", "503"),
        ("url.path", "/orders/1"),
        ("network.protocol.version", if http2 { "2" } else { "1.1" }),
    ] {
        assert_eq!(attribute(request, key).as_deref(), Some(value), "{key}");
    }
    let attempts = kind("SPAN_KIND_CLIENT");
    assert_eq!(attempts.len(), 2);
    for attempt in &attempts {
        assert_eq!(hex(&attempt["parentSpanId"]), hex(&request["spanId"]));
        assert_eq!(
            attribute(attempt, "http.response.status_code").as_deref(),
            Some("503")
        );
        let (from, to) = (&attempt["startTimeUnixNano"], &attempt["endTimeUnixNano"]);
        assert!(from.as_str() < to.as_str(), "{attempt}");
        assert!(request["startTimeUnixNano"].as_str() <= from.as_str());
    }
    // The service saw the last attempt's span as its caller.
    let parent = forwarded["traceparent"].as_str().unwrap();
    let last = hex(&attempts[1]["spanId"]);
    assert_eq!(parent, format!("00-{TRACE}-{last}-01"));
    assert_eq!(forwarded["tracestate"], "vendor=1");
    assert_eq!(gateway.access_log(1)[0]["trace"], TRACE);
}

#[test]
fn half_a_percent_of_the_rest_is_recorded_and_untouched_headers_pass() {
    let receiver = Receiver::start();
    let origins = ["one", "two"].map(Echo::start);
    let gateway = start(&receiver, &origins, "auto");
    let unsampled = GIVEN.replace("-01", "-00");
    let answer = gateway.get("shop.example", "/a", &[("traceparent", &unsampled)]);
    assert_eq!(
        answer.json()["headers"]["traceparent"],
        unsampled,
        "a caller that does not record is not recorded, and its header goes on"
    );
    let mut made = 0;
    for _ in 0..600 {
        let answer = gateway.get("shop.example", "/a", &[]);
        made += usize::from(answer.json()["headers"].get("traceparent").is_some());
    }
    assert_eq!(made, 3, "0.5 % of 600");
    gateway.wait_for("spans", || receiver.spans().len() >= 6);
    assert_eq!(receiver.spans().len(), 6);
    // The same metrics that Prometheus reads.
    gateway.wait_for("metrics", || {
        receiver.messages().iter().any(|message| {
            list(message, "resourceMetrics").iter().any(|resource| {
                list(resource, "scopeMetrics").iter().any(|scope| {
                    list(scope, "metrics").iter().any(|metric| {
                        metric["name"] == "edgemeter_requests"
                            && list(&metric["sum"], "dataPoints").iter().any(|point| {
                                attribute(point, "route").as_deref() == Some("shop")
                                    && point["asInt"] == "601"
                            })
                    })
                })
            })
        })
    });
    assert_eq!(
        gateway
            .scrape()
            .sum("edgemeter_otlp_spans_sent_total", |_| true),
        6
    );
}

#[test]
fn what_the_collector_does_not_take_is_counted_and_the_gateway_serves_on() {
    let receiver = Receiver::start();
    let origins = ["one", "two"].map(Echo::start);
    let gateway = start(&receiver, &origins, "auto");
    receiver.refuse(true);
    let headers = [("traceparent", GIVEN)];
    assert_eq!(gateway.get("shop.example", "/lost", &headers).status, 200);
    let lost = || {
        gateway
            .scrape()
            .sum("edgemeter_otlp_requests_lost_total", |_| true)
    };
    gateway.wait_for("loss", || lost() == 1);
    receiver.refuse(false);
    assert_eq!(gateway.get("shop.example", "/kept", &headers).status, 200);
    gateway.wait_for("spans", || receiver.spans().len() == 2);
    assert_eq!(lost(), 1);
}
