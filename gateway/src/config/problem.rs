//! How a complaint about the file reads, and where in the file it points.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}; fix: name a readable TOML file", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file says something wrong: every problem found, in file order, one per line.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    lines.join("\n")
}

/// One thing wrong with the file and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file's name as given.
    pub file: Arc<str>,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// Such as `routes[0].upstream`; `document` when no field is concerned.
    pub field: String,
    /// What is wrong.
    pub wrong: String,
    /// What to write.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            column,
            field,
            wrong,
            fix,
        } = self;
        write!(f, "{file}:{line}:{column}: {field}: {wrong}; fix: {fix}")
    }
}

/// The text problems point into.
pub(super) struct Source<'t> {
    file: Arc<str>,
    pub(super) text: &'t str,
}

impl<'t> Source<'t> {
    pub(super) fn new(file: &Path, text: &'t str) -> Self {
        Self {
            file: file.to_string_lossy().into(),
            text,
        }
    }

    pub(super) fn problem(
        &self,
        at: Range<usize>,
        field: impl Into<String>,
        wrong: impl Into<String>,
        fix: impl Into<String>,
    ) -> Problem {
        let before = self.text.get(..at.start).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Problem {
            file: self.file.clone(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            field: field.into(),
            wrong: wrong.into(),
            fix: fix.into(),
        }
    }
}

/// In file order.
pub(super) fn invalid(mut problems: Vec<Problem>) -> ConfigError {
    problems.sort_by_key(|problem| (problem.line, problem.column));
    ConfigError::Invalid(problems)
}

/// `` `a`, `b` ``, or a word for nothing.
pub(super) fn quoted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
    if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    }
}

/// The known name a misspelt one was meant to be.
pub(super) fn nearest<'a>(
    written: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let tolerated = (written.chars().count() / 3).max(2);
    known
        .into_iter()
        .map(|name| (edit_distance(written, name), name))
        .filter(|&(distance, name)| distance <= tolerated && distance < name.chars().count())
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name)
}

/// Insertions, deletions and replacements that turn one text into the other.
fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (above, letter) in from.chars().enumerate() {
        let mut diagonal = above;
        row[0] = above + 1;
        for (column, &other) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != other);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::{Source, edit_distance, nearest};
    use std::path::Path;

    #[test]
    fn distances() {
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("same", "same"), 0);
    }

    #[test]
    fn the_nearest_name_is_near() {
        let known = ["address", "name", "http2"];
        assert_eq!(nearest("adress", known), Some("address"));
        assert_eq!(nearest("interface", known), None);
        assert_eq!(nearest("zz", ["id"]), None);
    }

    #[test]
    fn columns_count_characters() {
        let source = Source::new(Path::new("f"), "a = 1\né = x");
        let problem = source.problem(11..12, "é", "w", "x");
        assert_eq!((problem.line, problem.column), (2, 5));
        assert_eq!(source.problem(99..99, "", "", "").line, 2);
    }
}
