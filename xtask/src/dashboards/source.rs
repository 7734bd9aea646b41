//! Expressions as the dashboards and the rules write them, with what Grafana puts in.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::{Labels, Place, RULES};

/// What Grafana puts in for its own variables; any duration would do.
const GRAFANA_DURATIONS: [(&str, &str); 3] = [
    ("__rate_interval", "5m"),
    ("__interval", "1m"),
    ("__range", "1h"),
];
/// What a variable of the dashboard becomes: all values.
const ALL_VALUES: &str = ".*";

/// An expression as written.
pub(super) struct Source {
    pub(super) place: Place,
    pub(super) text: String,
    pub(super) records: Option<String>,
    /// Labels that a legend or an alert's text shows.
    pub(super) shown: Labels,
    /// Labels that the rule adds to the result.
    pub(super) added: Labels,
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

pub(super) fn read_rules(text: &str) -> Result<Vec<Source>> {
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

pub(super) fn read_dashboard(file: &str, text: &str) -> Result<Vec<Source>> {
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
