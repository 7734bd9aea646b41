//! Who a client is: `[[tokens]]` (JWT), `[[forward_auth]]`, and what a route asks of them. And the
//! store that rate limits share.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::HeaderName;
use serde::Deserialize;
use toml::Spanned;

use super::Name;
use super::check::{Checker, Seen};
use super::problem::{nearest, quoted};
use super::raw::{Number, RawConfig, Text};
use super::route::RawRoute;

/// An issuer of tokens, and what its tokens must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenIssuer {
    /// Unique among issuers.
    pub name: Name,
    /// Where its public keys are.
    pub keys: KeySource,
    /// The `iss` claim.
    pub issuer: Box<str>,
    /// The `aud` claim.
    pub audience: Box<str>,
    /// What tokens may be signed with; never a shared secret.
    pub algorithms: Vec<Algorithm>,
    /// For clocks that differ.
    pub leeway: Duration,
    /// Between two looks at the keys.
    pub refresh: Duration,
    /// Claims the service gets as headers; clients' own such headers are removed.
    pub headers: Vec<(Box<str>, HeaderName)>,
}

/// Where a JWKS document is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A file, read again when it changes.
    File(PathBuf),
    /// Fetched by GET.
    Url(Box<str>),
}

/// A signature algorithm of RFC 7518 with a public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Their names are the registry's.
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    EdDsa,
}

/// By the names of the registry.
pub(super) const ALGORITHMS: [(&str, Algorithm); 9] = [
    ("RS256", Algorithm::Rs256),
    ("RS384", Algorithm::Rs384),
    ("RS512", Algorithm::Rs512),
    ("PS256", Algorithm::Ps256),
    ("PS384", Algorithm::Ps384),
    ("PS512", Algorithm::Ps512),
    ("ES256", Algorithm::Es256),
    ("ES384", Algorithm::Es384),
    ("EdDSA", Algorithm::EdDsa),
];

/// A service that is asked about each request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardAuth {
    /// Unique among them.
    pub name: Name,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it is asked for.
    pub path: Box<str>,
    /// For the whole answer.
    pub timeout: Duration,
    /// Request headers it is shown.
    pub request_headers: Vec<HeaderName>,
    /// Headers of its answer the service gets; clients' own such headers are removed.
    pub response_headers: Vec<HeaderName>,
    /// When it does not answer: let requests through.
    pub allow_on_error: bool,
}

/// Position in [`super::Config::tokens`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenIndex(pub usize);

/// Position in [`super::Config::forward_auth`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardAuthIndex(pub usize);

/// What a route asks of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Authentication {
    /// A token of this issuer.
    pub token: Option<TokenIndex>,
    /// Refuse requests without one; a bad one is refused in any case.
    pub token_required: bool,
    /// This service's consent.
    pub forward: Option<ForwardAuthIndex>,
}

/// Where rate limits of several gateways meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateStore {
    /// `redis://host:port/database`.
    pub redis: Box<str>,
    /// For one question.
    pub timeout: Duration,
    /// When it does not answer: let requests through, by the local limit; else refuse them.
    pub allow_on_error: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawTokens {
    pub(super) name: Text,
    keys: Text,
    issuer: Text,
    audience: Text,
    algorithms: Spanned<Vec<Text>>,
    leeway_seconds: Option<Number>,
    refresh_seconds: Option<Number>,
    #[serde(default)]
    headers: Vec<RawClaimHeader>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawClaimHeader {
    claim: Text,
    header: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawForwardAuth {
    pub(super) name: Text,
    address: Text,
    path: Option<Text>,
    timeout_ms: Option<Number>,
    request_headers: Option<Spanned<Vec<Text>>>,
    response_headers: Option<Spanned<Vec<Text>>>,
    on_error: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRateStore {
    redis: Text,
    timeout_ms: Option<Number>,
    on_error: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAuthentication {
    token: Option<Text>,
    token_required: Option<bool>,
    forward: Option<Text>,
}

const ON_ERROR: [(&str, bool); 2] = [("deny", false), ("allow", true)];

impl Checker<'_> {
    pub(super) fn tokens(&mut self, raw: &[RawTokens]) -> Option<Vec<TokenIssuer>> {
        let mut names = Seen::default();
        let checked: Vec<Option<TokenIssuer>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("tokens[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                let keys = self.key_source(&raw.keys, &format!("{here}.keys"));
                let field = format!("{here}.algorithms");
                let list = &raw.algorithms;
                let algorithms =
                    self.list(list.get_ref(), list.span(), &field, |c, text, field| {
                        c.choice(text, field, &ALGORITHMS)
                    });
                let leeway = raw.leeway_seconds.as_ref();
                let leeway = self.number(leeway, &format!("{here}.leeway_seconds"), 0..=600, 30);
                let refresh = raw.refresh_seconds.as_ref();
                let field = format!("{here}.refresh_seconds");
                let refresh = self.number(refresh, &field, 1..=86_400, 300);
                let headers: Vec<_> = raw
                    .headers
                    .iter()
                    .enumerate()
                    .map(|(index, raw)| {
                        let field = format!("{here}.headers[{index}].header");
                        let header = self.header_name(&raw.header, &field)?;
                        Some((Box::from(raw.claim.get_ref().as_str()), header))
                    })
                    .collect();
                Some(TokenIssuer {
                    name: name?,
                    keys: keys?,
                    issuer: raw.issuer.get_ref().as_str().into(),
                    audience: raw.audience.get_ref().as_str().into(),
                    algorithms: algorithms?,
                    leeway: Duration::from_secs(leeway?),
                    refresh: Duration::from_secs(refresh?),
                    headers: headers.into_iter().collect::<Option<_>>()?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    fn key_source(&mut self, text: &Text, field: &str) -> Option<KeySource> {
        let written = text.get_ref().as_str();
        if written.starts_with("https://") || written.starts_with("http://") {
            if written.parse::<http::Uri>().is_ok() {
                return Some(KeySource::Url(written.into()));
            }
            let fix = "write such as \"https://id.example/.well-known/jwks.json\"";
            self.report(
                text.span(),
                field,
                format!("\"{written}\" is not a URL"),
                fix,
            );
            return None;
        }
        self.path(text, field).map(KeySource::File)
    }

    fn header_names(
        &mut self,
        list: Option<&Spanned<Vec<Text>>>,
        field: &str,
        default: &[HeaderName],
    ) -> Option<Vec<HeaderName>> {
        match list {
            None => Some(default.to_vec()),
            Some(list) => {
                let (texts, at) = (list.get_ref(), list.span());
                self.list(texts, at, field, |checker, text, field| {
                    checker.header_name(text, field)
                })
            }
        }
    }

    pub(super) fn forward_auth(&mut self, raw: &[RawForwardAuth]) -> Option<Vec<ForwardAuth>> {
        let mut names = Seen::default();
        let checked: Vec<Option<ForwardAuth>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("forward_auth[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                let text = &raw.address;
                let address = self.address(text.get_ref(), text.span(), &format!("{here}.address"));
                let path = raw.path.as_ref();
                let written = path.map_or("/", |text| text.get_ref().as_str());
                let path = if written.starts_with('/') && written.parse::<http::Uri>().is_ok() {
                    Some(Box::from(written))
                } else {
                    let at = raw.path.as_ref().map_or(0..0, Spanned::span);
                    let wrong = format!("\"{written}\" is not a path");
                    self.report(
                        at,
                        format!("{here}.path"),
                        wrong,
                        "write such as \"/verify\"",
                    );
                    None
                };
                let timeout = raw.timeout_ms.as_ref();
                let timeout = self.number(timeout, &format!("{here}.timeout_ms"), 1..=60_000, 1000);
                let shown = [http::header::AUTHORIZATION, http::header::COOKIE];
                let list = raw.request_headers.as_ref();
                let request = self.header_names(list, &format!("{here}.request_headers"), &shown);
                let list = raw.response_headers.as_ref();
                let response = self.header_names(list, &format!("{here}.response_headers"), &[]);
                let on_error = raw.on_error.as_ref();
                let allow = self.choice_or(on_error, &format!("{here}.on_error"), &ON_ERROR);
                Some(ForwardAuth {
                    name: name?,
                    address: address?,
                    path: path?,
                    timeout: Duration::from_millis(timeout?),
                    request_headers: request?,
                    response_headers: response?,
                    allow_on_error: allow?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    pub(super) fn rate_store(&mut self, raw: &RawRateStore) -> Option<RateStore> {
        let written = raw.redis.get_ref().as_str();
        let field = "rate_limit_store.redis";
        let redis = if let Err(error) = redis::Client::open(written) {
            let fix = "write such as \"redis://127.0.0.1:6379\"";
            self.report(
                raw.redis.span(),
                field,
                format!("\"{written}\": {error}"),
                fix,
            );
            None
        } else {
            Some(written.into())
        };
        let timeout = raw.timeout_ms.as_ref();
        let timeout = self.number(timeout, "rate_limit_store.timeout_ms", 1..=10_000, 50);
        let on_error = raw.on_error.as_ref();
        let allow = self.choice_or(
            on_error,
            "rate_limit_store.on_error",
            &[ON_ERROR[1], ON_ERROR[0]],
        );
        Some(RateStore {
            redis: redis?,
            timeout: Duration::from_millis(timeout?),
            allow_on_error: allow?,
        })
    }

    pub(super) fn authentication(
        &mut self,
        config: &RawConfig,
        raw: &RawRoute,
        here: &str,
    ) -> Option<Authentication> {
        let Some(raw) = &raw.authentication else {
            return Some(Authentication::default());
        };
        let here = format!("{here}.authentication");
        let issuers: Vec<&str> = config
            .tokens
            .iter()
            .map(|t| t.name.get_ref().as_str())
            .collect();
        let services = config.forward_auth.iter();
        let services: Vec<&str> = services.map(|f| f.name.get_ref().as_str()).collect();
        let token = self.named(
            raw.token.as_ref(),
            &format!("{here}.token"),
            "tokens",
            &issuers,
        );
        let forward = raw.forward.as_ref();
        let forward = self.named(
            forward,
            &format!("{here}.forward"),
            "forward_auth",
            &services,
        );
        Some(Authentication {
            token: token?.map(TokenIndex),
            token_required: raw.token_required.unwrap_or(true),
            forward: forward?.map(ForwardAuthIndex),
        })
    }

    /// The position of the name among the known ones; `Some(None)` where none is written.
    fn named(
        &mut self,
        text: Option<&Text>,
        field: &str,
        table: &str,
        known: &[&str],
    ) -> Option<Option<usize>> {
        let Some(text) = text else { return Some(None) };
        let written = text.get_ref().as_str();
        let position = known.iter().position(|&name| name == written);
        if position.is_none() {
            let names = known.iter().copied();
            let fix = match nearest(written, names.clone()) {
                Some(meant) => format!("write \"{meant}\""),
                None => format!("add a [[{table}]] table named \"{written}\" or name another"),
            };
            let wrong = format!(
                "no [[{table}]] is named \"{written}\"; known: {}",
                quoted(names)
            );
            self.report(text.span(), field, wrong, fix);
        }
        position.map(Some)
    }
}
