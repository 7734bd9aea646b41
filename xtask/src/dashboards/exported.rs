//! What `/metrics` pages offer: metrics as declared, labels as sampled.

use std::collections::{BTreeMap, BTreeSet};

use super::{Labels, Use};

/// Made by Prometheus itself for each target it scrapes.
const SCRAPE_METRICS: [&str; 1] = ["up"];
/// Added by Prometheus to everything it scrapes.
const SCRAPE_LABELS: [&str; 2] = ["instance", "job"];

/// What `/metrics` pages offer.
pub(super) struct Exported {
    declared: BTreeSet<String>,
    /// Labels of the series that have samples.
    sampled: BTreeMap<String, Labels>,
}

impl Exported {
    pub(super) fn parse(expositions: &[&str]) -> Self {
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
    pub(super) fn lacks(&self, wanted: &Use) -> Vec<Option<String>> {
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
pub(super) fn families(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let declarations = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    declarations.filter_map(|declaration| declaration.trim_end().split_once(' '))
}

/// The series that a declared metric has.
pub(super) fn series_names(name: &str, kind: &str) -> Vec<String> {
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
