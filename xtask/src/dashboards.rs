//! Dashboards and rules ask only for what the programs export.
//!
//! [`expressions`] reads every dashboard and the rules, and fails on an expression that does not
//! parse or that wants a label its own aggregation dropped. [`check`] holds the metrics and labels
//! that are left against the text of real `/metrics` pages. [`unread`] is the other way around.
//!
//! A label is wanted by a matcher, `by`, `without`, `on`, a panel's legend or an alert's text, and
//! followed down to the metrics it must come from, through recorded rules too.
//!
//! Deliberately absent: `label_replace`, `label_join` and `count_values`, whose results have labels
//! that no metric has. An expression that uses such a label is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use promql_parser::label::{METRIC_NAME, MatchOp};
use promql_parser::parser::token::{T_BOTTOMK, T_TOPK};
use promql_parser::parser::{
    self, AggregateExpr, BinaryExpr, Call, Expr, LabelModifier, VectorMatchCardinality,
    VectorSelector,
};
use serde::Deserialize;
use serde_json::Value;

const RULES: &str = "prometheus/rules.yml";
/// What Grafana puts in for its own variables; any duration would do.
const GRAFANA_DURATIONS: [(&str, &str); 3] = [
    ("__rate_interval", "5m"),
    ("__interval", "1m"),
    ("__range", "1h"),
];
/// What a variable of the dashboard becomes: all values.
const ALL_VALUES: &str = ".*";
/// Made by Prometheus itself for each target it scrapes.
const SCRAPE_METRICS: [&str; 1] = ["up"];
/// Added by Prometheus to everything it scrapes.
const SCRAPE_LABELS: [&str; 2] = ["instance", "job"];

type Labels = BTreeSet<String>;

/// Where an expression is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Relative to the dashboards' directory.
    pub file: String,
    /// A panel's title, `variable` and its name, or a rule's name.
    pub panel: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.panel)
    }
}

/// A parsed PromQL expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    /// Where it is written.
    pub place: Place,
    /// As given to the parser, Grafana's variables replaced.
    pub text: String,
    /// The series it records, when it is a recording rule.
    pub records: Option<String>,
    /// What it reads; for a recorded series also what that reads.
    pub uses: Vec<Use>,
}

/// A series that an expression reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Its full name, suffix included.
    pub metric: String,
    /// Labels it must have.
    pub labels: BTreeSet<String>,
    /// Whether a rule records it; what it is made of follows in the same list.
    pub recorded: bool,
}

/// What an expression wants and no program exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Where it is wanted.
    pub place: Place,
    /// The metric.
    pub metric: String,
    /// The label the metric lacks; None when there is no such metric.
    pub label: Option<String>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            place,
            metric,
            label,
        } = self;
        match label {
            None => write!(f, "{place}: no program exports `{metric}`"),
            Some(label) => write!(f, "{place}: `{metric}` has no label `{label}`"),
        }
    }
}

/// Every expression in the dashboards (`*.json`) and the rules under `dashboards_dir`.
///
/// # Errors
/// Names the file, the panel and the expression that does not parse or contradicts itself.
pub fn expressions(dashboards_dir: &Path) -> Result<Vec<Expression>> {
    let rules_file = dashboards_dir.join(RULES);
    let mut sources = read_rules(&read(&rules_file)?).with_context(|| RULES.to_owned())?;
    for path in dashboard_files(dashboards_dir)? {
        let file = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let found = read_dashboard(&file, &read(&path)?).with_context(|| file.clone())?;
        ensure!(!found.is_empty(), "{file}: no expressions found");
        sources.extend(found);
    }
    resolve(sources)
}

/// Every metric and label the expressions want is in the texts, which are `/metrics` pages in the
/// OpenMetrics format. A metric that is declared and has no sample yet may have any label.
///
/// # Errors
/// Everything that is missing.
pub fn check(expressions: &[Expression], expositions: &[&str]) -> Result<(), Vec<Missing>> {
    let exported = Exported::parse(expositions);
    let mut missing = Vec::new();
    for expression in expressions {
        for wanted in expression.uses.iter().filter(|wanted| !wanted.recorded) {
            for label in exported.lacks(wanted) {
                let metric = wanted.metric.clone();
                let found = Missing {
                    place: expression.place.clone(),
                    metric,
                    label,
                };
                if !missing.contains(&found) {
                    missing.push(found);
                }
            }
        }
    }
    if missing.is_empty() {
        Ok(())
    } else {
        Err(missing)
    }
}

/// Metrics that the texts declare and no expression reads.
#[must_use]
pub fn unread(expressions: &[Expression], expositions: &[&str]) -> Vec<String> {
    let uses = expressions.iter().flat_map(|expression| &expression.uses);
    let read: BTreeSet<&str> = uses.map(|wanted| wanted.metric.as_str()).collect();
    let families = expositions.iter().flat_map(|text| families(text));
    families
        .filter(|(name, kind)| {
            let series = series_names(name, kind);
            !series.iter().any(|series| read.contains(series.as_str()))
        })
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// An expression as written.
struct Source {
    place: Place,
    text: String,
    records: Option<String>,
    /// Labels that a legend or an alert's text shows.
    shown: Labels,
    /// Labels that the rule adds to the result.
    added: Labels,
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn dashboard_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            files.push(path);
        }
    }
    ensure!(!files.is_empty(), "no dashboard in {}", directory.display());
    files.sort();
    Ok(files)
}

#[derive(Deserialize)]
struct RulesFile {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
struct Rule {
    record: Option<String>,
    alert: Option<String>,
    expr: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

fn read_rules(text: &str) -> Result<Vec<Source>> {
    let file: RulesFile = serde_yaml::from_str(text)?;
    let rules = file.groups.into_iter().flat_map(|group| group.rules);
    rules
        .map(|rule| {
            let panel = rule
                .record
                .clone()
                .or(rule.alert)
                .context("rule without a name")?;
            let texts = rule.labels.values().chain(rule.annotations.values());
            let added: Labels = rule.labels.keys().cloned().collect();
            let shown = texts.flat_map(|text| labels_after(text, "$labels."));
            Ok(Source {
                place: Place {
                    file: RULES.to_owned(),
                    panel,
                },
                text: rule.expr,
                records: rule.record,
                shown: shown.filter(|label| !added.contains(label)).collect(),
                added,
            })
        })
        .collect()
}

/// The labels whose names follow `marker` in a template.
fn labels_after(template: &str, marker: &str) -> Vec<String> {
    let rests = template.split(marker).skip(1).map(str::trim_start);
    let names = rests.map(|rest| &rest[..name_length(rest)]);
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn name_length(text: &str) -> usize {
    text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(text.len())
}

fn read_dashboard(file: &str, text: &str) -> Result<Vec<Source>> {
    let dashboard: Value = serde_json::from_str(text)?;
    let variables = list(&dashboard, "/templating/list");
    let names: BTreeSet<&str> = variables
        .iter()
        .filter_map(|v| v["name"].as_str())
        .collect();
    let source = |panel: String, text: &str, shown: Labels| -> Result<Source> {
        let place = Place {
            file: file.to_owned(),
            panel,
        };
        let text = replace_variables(text, &names).with_context(|| format!("{place}: {text}"))?;
        Ok(Source {
            place,
            text,
            records: None,
            shown,
            added: Labels::new(),
        })
    };
    let mut sources = Vec::new();
    for variable in variables
        .iter()
        .filter(|variable| variable["type"] == "query")
    {
        let name = variable["name"].as_str().unwrap_or_default();
        let query = variable.pointer("/query/query").or(variable.get("query"));
        let query = query.and_then(Value::as_str).unwrap_or_default();
        let text = label_values(query)
            .with_context(|| format!("variable {name}: `{query}` is not label_values(a, b)"))?;
        sources.push(source(format!("variable {name}"), &text, Labels::new())?);
    }
    // A collapsed row holds its panels inside.
    let mut panels: Vec<&Value> = list(&dashboard, "/panels").iter().rev().collect();
    while let Some(panel) = panels.pop() {
        panels.extend(list(panel, "/panels").iter().rev());
        for target in list(panel, "/targets") {
            let title = panel["title"].as_str().unwrap_or("(untitled)").to_owned();
            let Some(text) = target["expr"].as_str() else {
                bail!("{title}: a query without an expression");
            };
            let legend = target["legendFormat"].as_str().unwrap_or_default();
            sources.push(source(
                title,
                text,
                labels_after(legend, "{{").into_iter().collect(),
            )?);
        }
    }
    Ok(sources)
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// PromQL with the needs of Grafana's `label_values(selector, label)`.
fn label_values(query: &str) -> Option<String> {
    let arguments = query.strip_prefix("label_values(")?.strip_suffix(')')?;
    let (selector, label) = arguments.rsplit_once(',')?;
    Some(format!("count by ({}) ({selector})", label.trim()))
}

/// `$name`, `${name}` and `${name:format}` become what Grafana could put there.
fn replace_variables(text: &str, variables: &BTreeSet<&str>) -> Result<String> {
    let mut parts = text.split('$');
    let mut replaced = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = match part.strip_prefix('{') {
            Some(braced) => {
                let (inside, rest) = braced.split_once('}').context("`${` without `}`")?;
                (inside.split(':').next().unwrap_or_default(), rest)
            }
            None => part.split_at(name_length(part)),
        };
        let duration = GRAFANA_DURATIONS.iter().find(|(known, _)| *known == name);
        match duration {
            // The end of a line in a regular expression.
            _ if name.is_empty() => replaced.push('$'),
            Some((_, duration)) => replaced.push_str(duration),
            None if variables.contains(name) => replaced.push_str(ALL_VALUES),
            None => bail!("unknown variable ${name}"),
        }
        replaced.push_str(rest);
    }
    Ok(replaced)
}

/// Parses all, then follows each through the rules it reads.
fn resolve(sources: Vec<Source>) -> Result<Vec<Expression>> {
    let mut parsed = Vec::new();
    for source in sources {
        let expr = parser::parse(&source.text)
            .map_err(|error| anyhow::anyhow!("{}: {}: {error}", source.place, source.text))?;
        parsed.push((source, expr));
    }
    let mut rules = BTreeMap::new();
    for (source, expr) in &parsed {
        if let Some(name) = &source.records {
            rules.insert(name.as_str(), (expr, &source.added));
        }
    }
    let mut expressions = Vec::new();
    for (source, expr) in &parsed {
        let mut walk = Walk {
            rules: &rules,
            following: Vec::new(),
            uses: Vec::new(),
        };
        walk.expr(expr, &source.shown)
            .with_context(|| format!("{}: {}", source.place, source.text))?;
        expressions.push(Expression {
            place: source.place.clone(),
            text: source.text.clone(),
            records: source.records.clone(),
            uses: walk.uses,
        });
    }
    Ok(expressions)
}

/// Carries wanted labels from an expression's result down to the series it reads.
struct Walk<'a> {
    rules: &'a BTreeMap<&'a str, (&'a Expr, &'a Labels)>,
    /// Recorded series being followed, outermost first.
    following: Vec<String>,
    uses: Vec<Use>,
}

impl Walk<'_> {
    fn expr(&mut self, expr: &Expr, wanted: &Labels) -> Result<()> {
        match expr {
            Expr::Aggregate(aggregate) => self.aggregate(aggregate, wanted),
            Expr::Binary(binary) => self.binary(binary, wanted),
            Expr::Call(call) => self.call(call, wanted),
            Expr::Paren(paren) => self.expr(&paren.expr, wanted),
            Expr::Unary(unary) => self.expr(&unary.expr, wanted),
            Expr::Subquery(subquery) => self.expr(&subquery.expr, wanted),
            Expr::VectorSelector(selector) => self.selector(selector, wanted),
            Expr::MatrixSelector(matrix) => self.selector(&matrix.vs, wanted),
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => Ok(()),
        }
    }

    fn aggregate(&mut self, aggregate: &AggregateExpr, wanted: &Labels) -> Result<()> {
        if let Some(parameter) = &aggregate.param {
            self.expr(parameter, &Labels::new())?;
        }
        let named = aggregate
            .modifier
            .as_ref()
            .map(named_labels)
            .unwrap_or_default();
        let keeps_all = matches!(aggregate.op.id(), T_TOPK | T_BOTTOMK);
        let excludes = matches!(aggregate.modifier, Some(LabelModifier::Exclude(_)));
        for label in wanted {
            let kept = keeps_all || named.contains(label) != excludes;
            ensure!(
                kept,
                "label `{label}` is not in the result of `{aggregate}`"
            );
        }
        self.expr(&aggregate.expr, &(wanted | &named))
    }

    fn binary(&mut self, binary: &BinaryExpr, wanted: &Labels) -> Result<()> {
        let Some(matching) = binary.modifier.as_ref().and_then(|m| m.matching.as_ref()) else {
            // Series are paired by all their labels, so both sides have the same.
            self.expr(&binary.lhs, wanted)?;
            return self.expr(&binary.rhs, wanted);
        };
        let on = if matching.is_include() {
            named_labels(matching)
        } else {
            Labels::new()
        };
        let card = binary.modifier.as_ref().map(|modifier| &modifier.card);
        let (many, one) = match card {
            Some(VectorMatchCardinality::OneToMany(_)) => (&binary.rhs, &binary.lhs),
            _ => (&binary.lhs, &binary.rhs),
        };
        // group_left (label) brings labels over from the one side.
        let brought = card.and_then(VectorMatchCardinality::labels);
        let brought: Labels = brought
            .map(|b| b.labels.iter().cloned().collect())
            .unwrap_or_default();
        self.expr(many, &(&(wanted - &brought) | &on))?;
        self.expr(one, &(&brought | &on))
    }

    fn call(&mut self, call: &Call, wanted: &Labels) -> Result<()> {
        let mut wanted = wanted.clone();
        match call.func.name {
            // Their results have no labels, or only those of the text.
            "scalar" | "absent" | "absent_over_time" => wanted.clear(),
            "histogram_quantile" => {
                ensure!(
                    !wanted.contains("le"),
                    "histogram_quantile has no label `le`"
                );
                wanted.insert("le".to_owned());
            }
            _ => {}
        }
        call.args
            .args
            .iter()
            .try_for_each(|argument| self.expr(argument, &wanted))
    }

    fn selector(&mut self, selector: &VectorSelector, wanted: &Labels) -> Result<()> {
        let matchers = &selector.matchers;
        ensure!(
            matchers.or_matchers.is_empty(),
            "`or` between matchers is not PromQL"
        );
        let by_label = matchers.matchers.iter().find(|m| m.name == METRIC_NAME);
        let by_label = by_label
            .filter(|m| matches!(m.op, MatchOp::Equal))
            .map(|m| &m.value);
        let Some(metric) = selector.name.as_ref().or(by_label) else {
            bail!("`{selector}` names no metric");
        };
        let names = matchers.matchers.iter().map(|matcher| matcher.name.clone());
        let mut labels: Labels = names.filter(|name| name != METRIC_NAME).collect();
        labels.extend(wanted.iter().cloned());
        let rule = self.rules.get(metric.as_str()).copied();
        self.uses.push(Use {
            metric: metric.clone(),
            labels: labels.clone(),
            recorded: rule.is_some(),
        });
        let Some((expr, added)) = rule else {
            return Ok(());
        };
        ensure!(
            !self.following.contains(metric),
            "`{metric}` is recorded from itself"
        );
        self.following.push(metric.clone());
        self.expr(expr, &(&labels - added))
            .with_context(|| format!("recorded as `{metric}`"))?;
        self.following.pop();
        Ok(())
    }
}

fn named_labels(modifier: &LabelModifier) -> Labels {
    modifier.labels().labels.iter().cloned().collect()
}

/// What `/metrics` pages offer.
struct Exported {
    declared: BTreeSet<String>,
    /// Labels of the series that have samples.
    sampled: BTreeMap<String, Labels>,
}

impl Exported {
    fn parse(expositions: &[&str]) -> Self {
        let mut exported = Self {
            declared: BTreeSet::new(),
            sampled: BTreeMap::new(),
        };
        for text in expositions {
            for (name, kind) in families(text) {
                exported.declared.extend(series_names(name, kind));
            }
            for line in text
                .lines()
                .filter(|line| !line.starts_with('#') && !line.is_empty())
            {
                let (name, labels) = sample(line);
                exported
                    .sampled
                    .entry(name.to_owned())
                    .or_default()
                    .extend(labels);
            }
        }
        exported
    }

    /// `[None]` when there is no such metric, else the labels that are not there.
    fn lacks(&self, wanted: &Use) -> Vec<Option<String>> {
        if SCRAPE_METRICS.contains(&wanted.metric.as_str()) {
            return self.lacking(wanted, Some(&Labels::new()));
        }
        if !self.declared.contains(&wanted.metric) {
            return vec![None];
        }
        self.lacking(wanted, self.sampled.get(&wanted.metric))
    }

    fn lacking(&self, wanted: &Use, labels: Option<&Labels>) -> Vec<Option<String>> {
        let Some(labels) = labels else {
            return Vec::new();
        };
        let there = |label: &str| labels.contains(label) || SCRAPE_LABELS.contains(&label);
        wanted
            .labels
            .iter()
            .filter(|label| !there(label))
            .cloned()
            .map(Some)
            .collect()
    }
}

/// Name and type of each declared metric.
fn families(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let declarations = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    declarations.filter_map(|declaration| declaration.trim_end().split_once(' '))
}

/// The series that a declared metric has.
fn series_names(name: &str, kind: &str) -> Vec<String> {
    let suffixes: &[&str] = match kind {
        "counter" => &["_total"],
        "histogram" => &["_bucket", "_sum", "_count"],
        "summary" => &["", "_sum", "_count"],
        "info" => &["_info"],
        _ => &[""],
    };
    suffixes
        .iter()
        .map(|suffix| format!("{name}{suffix}"))
        .collect()
}

/// Name and labels of a sample such as `a_total{b="c",d="\"}"} 1`.
fn sample(line: &str) -> (&str, Vec<String>) {
    let end = line.find(['{', ' ']).unwrap_or(line.len());
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while let Some((label, value)) = rest.split_once("=\"") {
            labels.push(label.trim_start_matches(',').to_owned());
            let after = after_quoted(value);
            if after.starts_with('}') {
                break;
            }
            rest = after;
        }
    }
    (name, labels)
}

/// What follows a quoted value, given from behind its first quote.
fn after_quoted(value: &str) -> &str {
    let mut escaped = false;
    for (at, character) in value.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return &value[at + 1..],
            _ => {}
        }
    }
    ""
}

#[cfg(test)]
mod tests {
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
}
