//! What is missing and what is refused, on a small dashboard and a small page.

use std::fs;

use super::*;

const RULES_TEXT: &str = r#"
groups:
  - name: recorded
    rules:
      - record: route:wire:rate5m
        expr: sum by (route) (rate(wire_bytes_total{kind="route"}[5m]))
        labels: { site: here }
  - name: alerts
    rules:
      - alert: Down
        expr: up{job="edge"} == 0
        annotations: { summary: "{{ $labels.instance }} is down" }
"#;

const EXPOSITION: &str = r#"# HELP wire_bytes Bytes: "quoted" {braced}
# TYPE wire_bytes counter
wire_bytes_total{kind="route",route="a \"b\", {c=\"d\"}",leg="x\\"} 7
# TYPE duration_seconds histogram
duration_seconds_sum{route="a"} 0.5
duration_seconds_count{route="a"} 1
duration_seconds_bucket{le="+Inf",route="a"} 1
# TYPE flows gauge
flows 3
# TYPE build info
build_info{version="1"} 1
# TYPE quiet counter
# EOF
"#;

fn panel(expression: &str, legend: &str) -> Result<Vec<Expression>> {
    with_rules(RULES_TEXT, expression, legend)
}

/// A directory with one dashboard, its panel in a collapsed row.
fn with_rules(rules: &str, expression: &str, legend: &str) -> Result<Vec<Expression>> {
    let directory = tempfile::tempdir()?;
    let target = serde_json::json!({ "expr": expression, "legendFormat": legend });
    let dashboard = serde_json::json!({
        "templating": { "list": [
            { "type": "datasource", "name": "datasource", "query": "prometheus" },
            { "type": "query", "name": "route",
              "query": { "query": "label_values(wire_bytes_total{kind=\"route\"}, route)" } },
        ] },
        "panels": [{ "type": "row", "title": "Row", "panels": [
            { "title": "Panel", "targets": [target] },
        ] }],
    });
    fs::create_dir(directory.path().join("prometheus"))?;
    fs::write(directory.path().join(RULES), rules)?;
    fs::write(directory.path().join("one.json"), dashboard.to_string())?;
    expressions(directory.path())
}

fn missing(expression: &str) -> Vec<String> {
    let missing = check(&panel(expression, "").unwrap(), &[EXPOSITION]).err();
    missing
        .unwrap_or_default()
        .iter()
        .map(ToString::to_string)
        .collect()
}

fn refusal(expression: &str, legend: &str) -> String {
    format!("{:#}", panel(expression, legend).unwrap_err())
}

#[test]
fn every_place_is_read_and_recorded_series_are_followed() {
    let found = panel(r#"route:wire:rate5m{route=~"$route", site="here"}"#, "").unwrap();
    let places: Vec<String> = found.iter().map(|e| e.place.to_string()).collect();
    assert_eq!(
        places,
        [
            "prometheus/rules.yml: route:wire:rate5m",
            "prometheus/rules.yml: Down",
            "one.json: variable route",
            "one.json: Panel",
        ]
    );
    assert_eq!(found[0].records.as_deref(), Some("route:wire:rate5m"));
    assert_eq!(
        found[3].text,
        r#"route:wire:rate5m{route=~".*", site="here"}"#
    );
    let uses: Vec<(&str, bool)> = found[3]
        .uses
        .iter()
        .map(|u| (u.metric.as_str(), u.recorded))
        .collect();
    assert_eq!(
        uses,
        [("route:wire:rate5m", true), ("wire_bytes_total", false)]
    );
    assert_eq!(check(&found, &[EXPOSITION]), Ok(()));
}

#[test]
fn what_is_exported_is_not_missing() {
    for expression in [
        "flows",
        "build_info",
        "duration_seconds_sum / duration_seconds_count",
        "sum by (anything) (rate(quiet_total[$__rate_interval]))",
        r#"{__name__="flows", instance="a"}"#,
        r#"wire_bytes_total{route=~"^a${route:regex}$"}"#,
        "topk(3, sum by (route, leg) (increase(wire_bytes_total[$__range])))",
        "histogram_quantile(0.9, sum by (le, route) (rate(duration_seconds_bucket[5m])))",
        "wire_bytes_total * on (route) group_left (version) sum by (route, version) (quiet_total)",
    ] {
        assert_eq!(missing(expression), Vec::<String>::new(), "{expression}");
    }
}

#[test]
fn an_unknown_metric_is_missing() {
    assert_eq!(
        missing("sum(wire_total)"),
        ["one.json: Panel: no program exports `wire_total`"]
    );
    // The declared name is not the series' name.
    assert_eq!(
        missing("wire_bytes"),
        ["one.json: Panel: no program exports `wire_bytes`"]
    );
    assert_eq!(
        missing("build"),
        ["one.json: Panel: no program exports `build`"]
    );
    assert_eq!(
        missing("route:wire:rate1m"),
        ["one.json: Panel: no program exports `route:wire:rate1m`"]
    );
}

#[test]
fn an_unknown_label_is_missing() {
    let expected = ["one.json: Panel: `wire_bytes_total` has no label `rout`"];
    assert_eq!(missing(r#"wire_bytes_total{rout="a"}"#), expected);
    assert_eq!(
        missing("sum by (rout) (rate(wire_bytes_total[5m]))"),
        expected
    );
    assert_eq!(missing("sum without (rout) (wire_bytes_total)"), expected);
    assert_eq!(
        missing("wire_bytes_total / on (rout) quiet_total"),
        expected
    );
    assert_eq!(
        missing(r#"up{job="edge", route="a"}"#),
        ["one.json: Panel: `up` has no label `route`"]
    );
}

#[test]
fn an_unknown_label_of_a_legend_is_missing() {
    let found = panel("rate(wire_bytes_total[5m])", "{{rout}}").unwrap();
    let missing = check(&found, &[EXPOSITION]).unwrap_err();
    assert_eq!(missing[0].label.as_deref(), Some("rout"));
}

#[test]
fn a_metric_that_nobody_shows_is_named() {
    let found = panel("sum(flows) + count(build_info)", "").unwrap();
    assert_eq!(unread(&found, &[EXPOSITION]), ["duration_seconds", "quiet"]);
}

#[test]
fn an_expression_that_does_not_parse_is_refused() {
    let said = refusal("sum by (route) (rate(wire_bytes_total[5m])", "");
    assert!(
        said.starts_with("one.json: Panel: sum by (route) (rate("),
        "{said}"
    );
    let said = refusal("rate(wire_bytes_total)", "");
    assert!(said.contains("one.json: Panel"), "{said}");
}

#[test]
fn a_label_that_was_aggregated_away_is_refused() {
    for (expression, legend, label) in [
        ("sum by (route) (wire_bytes_total)", "{{ leg }}", "leg"),
        ("sum without (leg) (wire_bytes_total)", "{{leg}}", "leg"),
        (
            "sum by (leg) (sum by (route) (wire_bytes_total))",
            "",
            "leg",
        ),
        ("sum(flows) / on (route) flows", "", "route"),
        (r#"route:wire:rate5m{leg="client"}"#, "", "leg"),
        (
            "histogram_quantile(0.5, sum by (route) (duration_seconds_bucket))",
            "",
            "le",
        ),
    ] {
        let said = refusal(expression, legend);
        assert!(said.contains("one.json: Panel"), "{said}");
        assert!(
            said.contains(&format!("label `{label}` is not in the result")),
            "{said}"
        );
    }
}

#[test]
fn an_unknown_variable_is_refused() {
    let said = refusal(r#"wire_bytes_total{route="$rout"}"#, "");
    assert!(
        said.contains("one.json: Panel") && said.contains("$rout"),
        "{said}"
    );
}

#[test]
fn a_series_recorded_from_itself_is_refused() {
    let rules = "groups: [{ name: g, rules: [{ record: 'a:b', expr: 'sum(a:b)' }] }]";
    let said = format!("{:#}", with_rules(rules, "flows", "").unwrap_err());
    assert!(said.contains("`a:b` is recorded from itself"), "{said}");
}
