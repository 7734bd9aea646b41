//! Text to a raw configuration or price book: every syntax error at once, else every unknown field and wrong type.
//!
//! serde stops at its first error and knows where but not in which field. So the parsed document is
//! kept beside it: the error's span finds the field, the field is mended, and serde tries again.

use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::fields::example;
use super::problem::{ConfigError, Problem, Source, invalid, nearest, quoted};

pub(super) fn read<T: DeserializeOwned>(source: &Source<'_>) -> Result<T, ConfigError> {
    let (mut document, errors) = DeTable::parse_recoverable(source.text);
    if !errors.is_empty() {
        let problems = errors.iter().map(|error| syntax(source, &document, error));
        return Err(invalid(problems.collect()));
    }
    let mut problems = Vec::new();
    loop {
        let error = match T::deserialize(toml::Deserializer::from(document.clone())) {
            Ok(raw) if problems.is_empty() => return Ok(raw),
            Ok(_) => return Err(invalid(problems)),
            Err(error) => error,
        };
        let at = error.span().unwrap_or(0..0);
        let mut path = locate(document.get_ref(), &at);
        if let Some(&missing) = quoted_words(&error, "missing field").first() {
            path.push(Step::Key(missing.to_owned()));
            let field = render(&path);
            let fix = example(&field).map_or("add it".into(), |line| format!("add `{line}`"));
            problems.push(source.problem(at, field, "is missing", fix));
        } else {
            problems.push(wrong_shape(source, &error, at, &render(&path)));
        }
        let end = source.text.len();
        if mend(document.get_mut(), &path, end).is_none() {
            return Err(invalid(problems));
        }
    }
}

fn syntax(
    source: &Source<'_>,
    document: &Spanned<DeTable<'_>>,
    error: &toml::de::Error,
) -> Problem {
    let at = error.span().unwrap_or(0..0);
    let table = render(&enclosing_table(document.get_ref(), source.text, at.start));
    let before = source.text.get(..at.start).unwrap_or_default();
    let line = before.rsplit('\n').next().unwrap_or_default();
    let in_header = line.trim_start().starts_with('[');
    let (field, fix) = if error.message().contains("duplicate key") {
        let key = source.text.get(at.clone()).unwrap_or_default();
        let field = if in_header {
            key.to_owned()
        } else {
            join(&table, key)
        };
        (field, "keep one of the two")
    } else {
        let fix =
            "write TOML 1.x: `key = value` lines under [table] headers, text in double quotes";
        let field = if table.is_empty() || in_header {
            "document".to_owned()
        } else {
            table
        };
        (field, fix)
    };
    source.problem(at, field, error.message(), fix)
}

fn wrong_shape(
    source: &Source<'_>,
    error: &toml::de::Error,
    at: Range<usize>,
    field: &str,
) -> Problem {
    let words = quoted_words(error, "unknown field");
    if let Some((unknown, known)) = words.split_first() {
        let known = known.iter().copied();
        let fix = match nearest(unknown, known.clone()) {
            Some(meant) => format!("write `{meant}`"),
            None => "delete it".into(),
        };
        let wrong = format!("unknown field; known here: {}", quoted(known));
        return source.problem(at, field, wrong, fix);
    }
    let fix = example(field).map_or("delete it".into(), |line| format!("write `{line}`"));
    let field = if field.is_empty() { "document" } else { field };
    let message = error
        .message()
        .replace("expected i64", "expected a whole number");
    let message = message
        .replace("a sequence", "an array")
        .replace("map, ", "table, ");
    source.problem(at, field, message, fix)
}

/// The names serde put between backticks, when its message starts this way.
fn quoted_words<'e>(error: &'e toml::de::Error, start: &str) -> Vec<&'e str> {
    let message = error.message();
    if !message.starts_with(start) {
        return Vec::new();
    }
    message.split('`').skip(1).step_by(2).collect()
}

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Key(String),
    Index(usize),
}

fn render(path: &[Step]) -> String {
    path.iter().fold(String::new(), |field, step| match step {
        Step::Key(key) => join(&field, key),
        Step::Index(index) => format!("{field}[{index}]"),
    })
}

fn join(field: &str, key: &str) -> String {
    if field.is_empty() {
        key.to_owned()
    } else {
        format!("{field}.{key}")
    }
}

/// The field whose key or value spans exactly `at`, else the innermost one around its start.
fn locate(document: &DeTable<'_>, at: &Range<usize>) -> Vec<Step> {
    let mut search = Search {
        at,
        path: Vec::new(),
        best: Vec::new(),
        best_length: usize::MAX,
    };
    search.table(document);
    search.best
}

struct Search<'r> {
    at: &'r Range<usize>,
    path: Vec<Step>,
    best: Vec<Step>,
    best_length: usize,
}

impl Search<'_> {
    fn table(&mut self, table: &DeTable<'_>) {
        for (key, value) in table {
            self.path.push(Step::Key(key.get_ref().to_string()));
            self.consider(key.span());
            self.value(value);
            self.path.pop();
        }
    }

    fn array(&mut self, array: &DeArray<'_>) {
        for (index, value) in array.iter().enumerate() {
            self.path.push(Step::Index(index));
            self.value(value);
            self.path.pop();
        }
    }

    fn value(&mut self, value: &Spanned<DeValue<'_>>) {
        self.consider(value.span());
        match value.get_ref() {
            // What `mend` put in: its inner spans belong to another text.
            _ if value.span().is_empty() => {}
            DeValue::Table(table) => self.table(table),
            DeValue::Array(array) => self.array(array),
            _ => {}
        }
    }

    fn consider(&mut self, span: Range<usize>) {
        let length = if span == *self.at {
            0
        } else if span.contains(&self.at.start) {
            span.len()
        } else {
            return;
        };
        // On equal terms the inner one: an array of tables spans what its first table does.
        if length <= self.best_length {
            self.best_length = length;
            self.best = self.path.clone();
        }
    }
}

/// The table a line at this offset belongs to: the last header before it, or the inline table
/// around it.
fn enclosing_table(document: &DeTable<'_>, text: &str, offset: usize) -> Vec<Step> {
    fn visit(
        value: &Spanned<DeValue<'_>>,
        path: &mut Vec<Step>,
        wanted: &impl Fn(&Range<usize>) -> bool,
        best: &mut (usize, Vec<Step>),
    ) {
        match value.get_ref() {
            DeValue::Table(table) => {
                let span = value.span();
                if wanted(&span) && span.start >= best.0 {
                    *best = (span.start, path.clone());
                }
                for (key, value) in table {
                    path.push(Step::Key(key.get_ref().to_string()));
                    visit(value, path, wanted, best);
                    path.pop();
                }
            }
            DeValue::Array(array) => {
                for (index, value) in array.iter().enumerate() {
                    path.push(Step::Index(index));
                    visit(value, path, wanted, best);
                    path.pop();
                }
            }
            _ => {}
        }
    }
    let wanted = |span: &Range<usize>| {
        let header = text
            .get(span.start..)
            .is_some_and(|rest| rest.starts_with('['));
        span.start <= offset && (header || span.contains(&offset))
    };
    let mut best = (0, Vec::new());
    for (key, value) in document {
        let mut path = vec![Step::Key(key.get_ref().to_string())];
        visit(value, &mut path, &wanted, &mut best);
    }
    best.1
}

/// Makes the innermost table entry on the path harmless, so that the next error can be found:
/// the field's example takes its place, or nothing when it is unknown or a whole section.
/// Elements of arrays are not taken out one by one, to keep the other indices true: of two wrong
/// elements in one list, the second shows once the first is right.
fn mend(table: &mut DeTable<'_>, path: &[Step], end: usize) -> Option<()> {
    let last_key = path.iter().rposition(|step| matches!(step, Step::Key(_)))?;
    let Step::Key(key) = &path[last_key] else {
        return None;
    };
    let table = descend(table, &path[..last_key])?;
    let known = table.remove(key.as_str());
    let example = example(&render(&path[..=last_key])).filter(|line| !line.starts_with('['));
    let Some(line) = example else {
        return known.map(|_| ());
    };
    for (key, value) in DeTable::parse(line).ok()?.into_inner() {
        let value = Spanned::new(end..end, value.into_inner());
        table.insert(Spanned::new(end..end, key.into_inner()), value);
    }
    Some(())
}

fn descend<'t, 'i>(table: &'t mut DeTable<'i>, path: &[Step]) -> Option<&'t mut DeTable<'i>> {
    let Some((Step::Key(key), mut rest)) = path.split_first() else {
        return Some(table);
    };
    let mut value = table.get_mut(key.as_str())?.get_mut();
    while let Some((Step::Index(index), after)) = rest.split_first() {
        let DeValue::Array(array) = value else {
            return None;
        };
        value = array.get_mut(*index)?.get_mut();
        rest = after;
    }
    match value {
        DeValue::Table(table) => descend(table, rest),
        _ => None,
    }
}
