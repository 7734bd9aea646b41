//! What becomes of responses on their way: `[cache]`, and a route's cache, compression and hints.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::Name;
use super::check::Checker;
use super::raw::{Number, Text};
use super::route::RawRoute;

/// The store of responses; it belongs to the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Bound of the memory tier.
    pub memory_bytes_max: u64,
    /// Folder of the disk tier; None: memory only.
    pub directory: Option<PathBuf>,
    /// Bound of the disk tier.
    pub disk_bytes_max: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            memory_bytes_max: 64 << 20,
            directory: None,
            disk_bytes_max: 1 << 30,
        }
    }
}

/// How a route's responses are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachePolicy {
    /// Freshness of responses that say nothing of it; zero: they are not stored.
    pub default: Duration,
    /// Where the response says nothing: how long a stale one may be served while it is fetched.
    pub stale_while_revalidate: Duration,
    /// Where the response says nothing: how long a stale one may be served when it cannot be.
    pub stale_if_error: Duration,
    /// Larger bodies are not stored.
    pub object_bytes_max: u64,
}

/// How a route's responses are compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compression {
    /// 1 is fastest.
    pub level: u32,
    /// Shorter bodies are left alone, where their length is known.
    pub min_bytes: u64,
}

/// A resource the client is told of before the service answers, or with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// A `Link` header value: `</app.css>; rel=preload; as=style`.
    pub link: Box<str>,
    /// Only to clients of at least this value; see [`Hints::value_header`].
    pub min_value: u64,
    /// Only where the cache holds this path, so that the hint costs the service nothing.
    pub cached_path: Option<Box<str>>,
}

/// A route's hints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// The claim of a verified token with the client's value, a whole number. Of claim, header and
    /// cookie the first that is there counts; clients without any are worth 0.
    pub value_claim: Option<Box<str>>,
    /// The request header with it.
    pub value_header: Option<http::HeaderName>,
    /// The cookie with it.
    pub value_cookie: Option<Box<str>>,
    /// All that apply are given.
    pub hints: Vec<Hint>,
    /// None: with the answer only.
    pub early: Option<Early>,
}

/// To whom a route's hints are sent before the answer, as 103, while the upstream is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Early {
    /// Only to clients of at least this value.
    pub min_value: u64,
    /// Only to these tenants; empty: to all.
    pub tenants: Vec<Name>,
    /// Only to clients in this variant: `experiment=variant`.
    pub variant: Option<Box<str>>,
    /// Also what the page's last answer named in `Link`.
    pub learn: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawCache {
    memory_bytes_max: Option<Number>,
    directory: Option<Text>,
    disk_bytes_max: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawCachePolicy {
    default_seconds: Option<Number>,
    stale_while_revalidate_seconds: Option<Number>,
    stale_if_error_seconds: Option<Number>,
    object_bytes_max: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawCompression {
    level: Option<Number>,
    min_bytes: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawHints {
    value_claim: Option<Text>,
    value_header: Option<Text>,
    value_cookie: Option<Text>,
    #[serde(default)]
    links: Vec<RawHint>,
    early: Option<RawEarly>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawEarly {
    min_value: Option<Number>,
    #[serde(default)]
    tenants: Vec<Text>,
    variant: Option<Text>,
    #[serde(default)]
    learn: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawHint {
    link: Text,
    min_value: Option<Number>,
    cached_path: Option<Text>,
}

/// What a route does with its responses.
pub(super) struct Content {
    pub(super) cache: Option<CachePolicy>,
    pub(super) compression: Option<Compression>,
    pub(super) hints: Hints,
}

impl Checker<'_> {
    pub(super) fn cache(&mut self, raw: Option<&RawCache>) -> Option<Cache> {
        let default = Cache::default();
        let Some(raw) = raw else { return Some(default) };
        let memory = raw.memory_bytes_max.as_ref();
        let memory = self.number(memory, "cache.memory_bytes_max", 0..=1 << 46, 64 << 20);
        let disk = raw.disk_bytes_max.as_ref();
        let disk = self.number(disk, "cache.disk_bytes_max", 1..=1 << 50, 1 << 30);
        let directory = match &raw.directory {
            None => Some(None),
            Some(text) => self.path(text, "cache.directory").map(Some),
        };
        Some(Cache {
            memory_bytes_max: memory?,
            directory: directory?,
            disk_bytes_max: disk?,
        })
    }

    pub(super) fn content(&mut self, raw: &RawRoute, here: &str) -> Option<Content> {
        let cache = match &raw.cache {
            None => Some(None),
            Some(raw) => self.cache_policy(raw, &format!("{here}.cache")).map(Some),
        };
        let compression = match &raw.compression {
            None => Some(None),
            Some(raw) => {
                let here = format!("{here}.compression");
                let level = raw.level.as_ref();
                let level = self.number(level, &format!("{here}.level"), 1..=9, 3);
                let min = raw.min_bytes.as_ref();
                let min = self.number(min, &format!("{here}.min_bytes"), 0..=1 << 30, 512);
                level
                    .zip(min)
                    .map(|(level, min_bytes)| Some(Compression { level, min_bytes }))
            }
        };
        let hints = match &raw.hints {
            None => Some(Hints::default()),
            Some(hints) => self.hints(hints, raw, &format!("{here}.hints")),
        };
        Some(Content {
            cache: cache?,
            compression: compression?,
            hints: hints?,
        })
    }

    fn cache_policy(&mut self, raw: &RawCachePolicy, here: &str) -> Option<CachePolicy> {
        const YEAR: i64 = 31_536_000;
        let mut seconds = |raw: &Option<Number>, name: &str| {
            self.number(raw.as_ref(), &format!("{here}.{name}"), 0..=YEAR, 0)
                .map(Duration::from_secs)
        };
        let default = seconds(&raw.default_seconds, "default_seconds");
        let stale = &raw.stale_while_revalidate_seconds;
        let stale_while = seconds(stale, "stale_while_revalidate_seconds");
        let stale_if = seconds(&raw.stale_if_error_seconds, "stale_if_error_seconds");
        let most = raw.object_bytes_max.as_ref();
        let field = format!("{here}.object_bytes_max");
        let most = self.number(most, &field, 1..=1 << 40, 10 << 20);
        Some(CachePolicy {
            default: default?,
            stale_while_revalidate: stale_while?,
            stale_if_error: stale_if?,
            object_bytes_max: most?,
        })
    }

    fn hints(&mut self, raw: &RawHints, route: &RawRoute, here: &str) -> Option<Hints> {
        let value_header = match &raw.value_header {
            None => Some(None),
            Some(text) => self
                .header_name(text, &format!("{here}.value_header"))
                .map(Some),
        };
        let hints: Vec<Option<Hint>> = raw
            .links
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("{here}.links[{index}]");
                let link = raw.link.get_ref().as_str();
                let valid = link.starts_with('<')
                    && link.contains(">;")
                    && link.contains("rel=")
                    && http::HeaderValue::from_str(link).is_ok();
                if !valid {
                    let wrong = format!("\"{link}\" is not a Link header value");
                    let fix = "write such as \"</app.css>; rel=preload; as=style\"";
                    self.report(raw.link.span(), format!("{here}.link"), wrong, fix);
                }
                let least = raw.min_value.as_ref();
                let field = format!("{here}.min_value");
                let least = self.number(least, &field, 0..=i64::MAX, 0);
                let path = raw.cached_path.as_ref();
                Some(Hint {
                    link: valid.then(|| link.into())?,
                    min_value: least?,
                    cached_path: path.map(|text| text.get_ref().as_str().into()),
                })
            })
            .collect();
        let early = match &raw.early {
            None => Some(None),
            Some(raw) => self.early(raw, route, &format!("{here}.early")).map(Some),
        };
        let name = |text: &Option<Text>| text.as_ref().map(|text| text.get_ref().as_str().into());
        Some(Hints {
            value_claim: name(&raw.value_claim),
            value_header: value_header?,
            value_cookie: name(&raw.value_cookie),
            early: early?,
            hints: hints.into_iter().collect::<Option<_>>()?,
        })
    }

    fn early(&mut self, raw: &RawEarly, route: &RawRoute, here: &str) -> Option<Early> {
        let field = format!("{here}.min_value");
        let least = self.number(raw.min_value.as_ref(), &field, 0..=i64::MAX, 0);
        let tenants: Vec<Option<Name>> = raw
            .tenants
            .iter()
            .enumerate()
            .map(|(index, text)| {
                let field = format!("{here}.tenants[{index}]");
                self.name(text.get_ref(), text.span(), &field)
            })
            .collect();
        if let Some(text) = &raw.variant {
            let known = route.experiments.iter().flat_map(|list| list.get_ref());
            let known: Vec<&str> = known.map(|name| name.get_ref().as_str()).collect();
            let named = text.get_ref().split_once('=');
            let fits = named
                .is_some_and(|(name, variant)| known.contains(&name) && Name::is_valid(variant));
            if !fits {
                let wrong = format!("\"{}\" is no variant of this route's", text.get_ref());
                let fix = "write \"experiment=variant\", of an experiment in `experiments`";
                self.report(text.span(), format!("{here}.variant"), wrong, fix);
                return None;
            }
        }
        Some(Early {
            min_value: least?,
            tenants: tenants.into_iter().collect::<Option<_>>()?,
            variant: raw
                .variant
                .as_ref()
                .map(|text| text.get_ref().as_str().into()),
            learn: raw.learn,
        })
    }
}
