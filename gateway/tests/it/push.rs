//! Usage events from a real gateway that is killed with -9, to a sink that loses answers: what
//! the sink counted is what the ledger holds, to the byte.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use edgemeter::owner::OwnerKind;
use serde_json::Value;
use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site, bytes_of_kind};

const SINK: &str = "127.0.0.1:9955";

/// Bytes by event id: an event that comes again changes nothing.
#[derive(Default)]
struct Sink {
    events: BTreeMap<String, i64>,
    requests: usize,
    lost_answers: usize,
}

fn serve(stream: &TcpStream, sink: &Mutex<Sink>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let mut sink = sink.lock().unwrap();
        sink.requests += 1;
        for event in serde_json::from_slice::<Vec<Value>>(&body).unwrap() {
            let id = event["id"].as_str().unwrap().to_owned();
            let bytes = event["data"]["wire_bytes"]
                .as_str()
                .unwrap()
                .parse()
                .unwrap();
            let before = sink.events.insert(id, bytes);
            assert!(before.is_none_or(|before| before == bytes), "{event}");
        }
        if sink.requests % 3 == 1 {
            // Processed, and the answer is lost.
            sink.lost_answers += 1;
            return None;
        }
        drop(sink);
        (&*stream)
            .write_all(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
            .ok()?;
    }
}

#[test]
fn the_sink_has_every_byte_once_over_kill_9_and_lost_answers() {
    let extra = format!(
        "[[push]]\nname = \"bill\"\nurl = \"http://{SINK}/\"\nwindow_seconds = 1\nbatch = 4\n"
    );
    let mut site = Site::start(
        "pu",
        &Setup {
            extra,
            ..Setup::default()
        },
    );
    let sink = Arc::<Mutex<Sink>>::default();
    let listener = site
        .hosts
        .gateway
        .run(|| TcpListener::bind(SINK))
        .unwrap()
        .unwrap();
    let shared = Arc::clone(&sink);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || serve(&stream.unwrap(), &shared));
        }
    });
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 20);
    for _ in 0..3 {
        load::run(&site.hosts.client, &plan).unwrap();
        std::thread::sleep(Duration::from_millis(700));
        site.end(libc::SIGKILL);
        site.launch();
    }
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let started = Instant::now();
    loop {
        let page = site.scrape();
        let left = page.sum("edgemeter_push_outstanding_bytes", |_| true);
        let posted =
            bytes_of_kind(&site, OwnerKind::Route) + bytes_of_kind(&site, OwnerKind::Overhead);
        let counted: i64 = sink.lock().unwrap().events.values().sum();
        if left == 0 && counted == posted {
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "the sink counted {counted}, the ledger holds {posted}, {left} outstanding: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(300));
    }
    let sink = sink.lock().unwrap();
    assert!(sink.lost_answers > 0 && sink.events.len() > 12);
    let (sound, said) = site.edgemeter(&["ledger", "check", "--config", "edgemeter.toml"]);
    assert!(sound && said.contains("every invariant holds"), "{said}");
    let (fine, said) = site.edgemeter(&["push", "status", "--config", "edgemeter.toml"]);
    assert!(
        fine && said.contains("0 waiting, 0 sent, 0 refused, 0 in doubt"),
        "{said}"
    );
}
