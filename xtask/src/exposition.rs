//! Reading a `/metrics` page: fetch and parse, enough for a table and a test.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

const DEADLINE: Duration = Duration::from_secs(5);

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Metric name, suffixes included.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value as written: counters are integers and stay exact.
    pub value: String,
}

/// A parsed page.
#[derive(Clone, Debug, Default)]
pub struct Exposition {
    /// All samples.
    pub samples: Vec<Sample>,
}

impl Sample {
    /// A label's value; empty when absent.
    #[must_use]
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }

    /// The value of an integer sample; 0 when it is none.
    #[must_use]
    pub fn integer(&self) -> i128 {
        self.value.parse().unwrap_or(0)
    }
}

impl Exposition {
    /// Parses the text format.
    ///
    /// # Errors
    /// Names the line that is no sample.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines
            .map(|line| sample(line).with_context(|| format!("not a sample: {line}")))
            .collect::<Result<_>>()?;
        Ok(Self { samples })
    }

    /// Samples of a name.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.samples
            .iter()
            .filter(move |sample| sample.name == name)
    }

    /// Sum of the samples of a name that satisfy a condition.
    pub fn sum(&self, name: &str, condition: impl Fn(&Sample) -> bool) -> i128 {
        self.named(name)
            .filter(|sample| condition(sample))
            .map(Sample::integer)
            .sum()
    }
}

/// GETs a path over plain HTTP/1.1 and returns status and body.
///
/// # Errors
/// Not reachable, or not HTTP.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    get_within(DEADLINE, address, path)
}

/// The same with another deadline for each step.
///
/// # Errors
/// See [`get`].
pub fn get_within(deadline: Duration, address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, deadline)
        .with_context(|| format!("connecting to {address}"))?;
    stream
        .set_read_timeout(Some(deadline))
        .context("read timeout")?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )
    .context("asking")?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .context("reading the answer")?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").context("no end of header")?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .context("no status")?;
    Ok((status, body.to_owned()))
}

/// GETs and parses a metrics page.
///
/// # Errors
/// See [`get`] and [`Exposition::parse`].
pub fn scrape(address: SocketAddr) -> Result<Exposition> {
    let (status, body) = get(address, "/metrics")?;
    ensure!(status == 200, "/metrics answered {status}");
    Exposition::parse(&body)
}

fn sample(line: &str) -> Option<Sample> {
    let (head, rest) = match line.find('{') {
        None => line
            .split_once(' ')
            .map(|(name, rest)| ((name, ""), rest))?,
        Some(open) => {
            let close = line.rfind("} ")?;
            ((&line[..open], &line[open + 1..close]), &line[close + 2..])
        }
    };
    let mut labels = BTreeMap::new();
    let mut text = head.1;
    while !text.is_empty() {
        let (name, after) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (_, '\\') => value.push(match characters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (at, '"') => break at,
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.to_owned(), value);
        text = after[end + 1..].trim_start_matches(',');
    }
    let value = rest.split(' ').next()?.to_owned();
    Some(Sample {
        name: head.0.to_owned(),
        labels,
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_with_and_without_labels() {
        let page = Exposition::parse(
            "# HELP a b\na_total{x=\"1,2\",y=\"q\\\"}\\\\\"} 18446744073709551615\nb 0.5\n# EOF\n",
        )
        .unwrap();
        assert_eq!(page.samples.len(), 2);
        assert_eq!(page.samples[0].label("x"), "1,2");
        assert_eq!(page.samples[0].label("y"), "q\"}\\");
        assert_eq!(page.samples[0].integer(), i128::from(u64::MAX));
        assert_eq!(page.samples[1].value, "0.5");
        assert_eq!(
            page.sum("a_total", |sample| sample.label("x") == "1,2"),
            i128::from(u64::MAX)
        );
    }

    #[test]
    fn a_broken_line_is_named() {
        let error = Exposition::parse("a{x=\"1} 2").unwrap_err().to_string();
        assert!(error.contains("a{x="), "{error}");
    }
}
