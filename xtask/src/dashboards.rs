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

mod exported;
mod follow;
mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use anyhow::{Context as _, Result, ensure};

use exported::{Exported, families, series_names};
use follow::resolve;
use source::{read_dashboard, read_rules};

const RULES: &str = "prometheus/rules.yml";

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
