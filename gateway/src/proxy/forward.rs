//! What a route changes on the way: the address asked for, and headers. Pure.

use http::{HeaderName, HeaderValue, Uri, uri::PathAndQuery};
use pingora::{
    Result,
    http::{RequestHeader, ResponseHeader},
};

use crate::config::{HeaderEdits, PathEdit, PathPattern, Redirect};

/// The path after an edit, for a route that matched by `pattern`.
pub fn edited_path(edit: &PathEdit, pattern: &PathPattern, path: &str) -> String {
    match edit {
        PathEdit::Full(full) => full.to_string(),
        PathEdit::Prefix(prefix) => {
            let matched = match pattern {
                PathPattern::Prefix(matched) => matched.len(),
                _ => 0,
            };
            let rest = path.get(matched..).unwrap_or_default();
            let joined = format!("{}{rest}", prefix.trim_end_matches('/'));
            if joined.is_empty() {
                "/".into()
            } else {
                joined
            }
        }
    }
}

/// The URI with another path and the same query.
pub fn with_path(uri: &Uri, path: &str) -> Option<Uri> {
    let text = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(text.parse::<PathAndQuery>().ok()?);
    Uri::from_parts(parts).ok()
}

/// Where a redirect leads, for a request that came over `scheme` to `port`.
pub fn location(
    redirect: &Redirect,
    pattern: &PathPattern,
    (scheme, host, port): (&str, &str, u16),
    uri: &Uri,
) -> String {
    // Gateway API: a scheme without a port means the scheme's port; without either, the
    // listener's. Well-known ports are not written.
    let well_known = |scheme: &str| if scheme == "https" { 443 } else { 80 };
    let to_scheme = redirect.scheme.unwrap_or(scheme);
    let port = match (redirect.port, redirect.scheme) {
        (Some(port), _) => port,
        (None, Some(scheme)) => well_known(scheme),
        (None, None) => port,
    };
    let host = redirect.host.as_deref().unwrap_or(host);
    let path = match &redirect.path {
        Some(edit) => edited_path(edit, pattern, uri.path()),
        None => uri.path().to_owned(),
    };
    let mut location = format!("{to_scheme}://{host}");
    if port != well_known(to_scheme) {
        location.push_str(&format!(":{port}"));
    }
    location.push_str(&path);
    if let Some(query) = uri.query() {
        location.push('?');
        location.push_str(query);
    }
    location
}

/// Another host to ask for.
///
/// # Errors
/// pingora cannot hold the header.
pub fn set_host(request: &mut RequestHeader, host: &str) -> Result<()> {
    // Where the URI has an authority (HTTP/2), pingora goes by it.
    if request.uri.authority().is_some() {
        let mut parts = request.uri.clone().into_parts();
        parts.authority = host.parse().ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            request.set_uri(uri);
        }
    }
    request.insert_header(http::header::HOST, host)
}

/// Headers of a request or a response.
pub trait Headers {
    /// Replaces what is there.
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()>;
    /// Beside what is there.
    fn add(&mut self, name: HeaderName, value: HeaderValue) -> Result<()>;
    /// Takes all of a name away.
    fn take(&mut self, name: &HeaderName);
}

impl Headers for RequestHeader {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.insert_header(name, value)
    }
    fn add(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.append_header(name, value).map(|_| ())
    }
    fn take(&mut self, name: &HeaderName) {
        self.remove_header(name);
    }
}

impl Headers for ResponseHeader {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.insert_header(name, value)
    }
    fn add(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.append_header(name, value).map(|_| ())
    }
    fn take(&mut self, name: &HeaderName) {
        self.remove_header(name);
    }
}

/// Applies a route's edits.
///
/// # Errors
/// pingora cannot hold the header.
pub fn edit(edits: &HeaderEdits, headers: &mut impl Headers) -> Result<()> {
    for name in &edits.remove {
        headers.take(name);
    }
    for (name, value) in &edits.set {
        headers.set(name.clone(), value.clone())?;
    }
    for (name, value) in &edits.add {
        headers.add(name.clone(), value.clone())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table under HTTPPathModifier.replacePrefixMatch in the Gateway API (v1).
    #[test]
    fn prefixes_are_replaced_as_the_gateway_api_says() {
        for (path, matched, replacement, modified) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
        ] {
            let matched = PathPattern::Prefix(matched.trim_end_matches('/').into());
            let edit = PathEdit::Prefix(replacement.into());
            assert_eq!(
                edited_path(&edit, &matched, path),
                modified,
                "{path} {replacement:?}"
            );
        }
    }

    fn redirect() -> Redirect {
        Redirect {
            scheme: None,
            host: None,
            port: None,
            path: None,
            status: 302,
        }
    }

    /// HTTPRequestRedirectFilter in the Gateway API (v1): "If no port is specified, the redirect
    /// port MUST be derived using the following rules: if redirect scheme is not-empty, the
    /// redirect port MUST be the well-known port associated with the redirect scheme …; if
    /// redirect scheme is empty, the redirect port MUST be the Gateway Listener port." And the
    /// port is not written where it is the scheme's.
    #[test]
    fn redirects_derive_their_port_as_the_gateway_api_says() {
        let pattern = PathPattern::Prefix("/a".into());
        let uri: Uri = "/a/b?c=d".parse().unwrap();
        let to = |redirect: &Redirect, from| location(redirect, &pattern, from, &uri);
        let https = Redirect {
            scheme: Some("https"),
            ..redirect()
        };
        assert_eq!(to(&https, ("http", "h", 8080)), "https://h/a/b?c=d");
        let port = Redirect {
            port: Some(8443),
            ..https
        };
        assert_eq!(to(&port, ("http", "h", 80)), "https://h:8443/a/b?c=d");
        let host = Redirect {
            host: Some("www.h".into()),
            ..redirect()
        };
        assert_eq!(to(&host, ("http", "h", 8080)), "http://www.h:8080/a/b?c=d");
        assert_eq!(to(&host, ("https", "h", 443)), "https://www.h/a/b?c=d");
        let path = Redirect {
            path: Some(PathEdit::Prefix("/z".into())),
            ..redirect()
        };
        assert_eq!(to(&path, ("http", "h", 80)), "http://h/z/b?c=d");
    }

    #[test]
    fn the_query_stays() {
        let uri: Uri = "/a?b=c".parse().unwrap();
        assert_eq!(with_path(&uri, "/x").unwrap().to_string(), "/x?b=c");
        let uri: Uri = "http://h/a".parse().unwrap();
        assert_eq!(with_path(&uri, "/x").unwrap().to_string(), "http://h/x");
        assert!(with_path(&uri, "/a b").is_none());
    }

    #[test]
    fn headers_are_removed_set_and_added() {
        let edits = HeaderEdits {
            set: vec![(HeaderName::from_static("a"), HeaderValue::from_static("2"))],
            add: vec![(HeaderName::from_static("b"), HeaderValue::from_static("2"))],
            remove: vec![HeaderName::from_static("c")],
        };
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        for name in ["a", "b", "c"] {
            request.insert_header(name, "1").unwrap();
        }
        edit(&edits, &mut request).unwrap();
        let all = |name| request.headers.get_all(name).iter().collect::<Vec<_>>();
        assert_eq!(all("a"), ["2"]);
        assert_eq!(all("b"), ["1", "2"]);
        assert!(all("c").is_empty());
    }
}
