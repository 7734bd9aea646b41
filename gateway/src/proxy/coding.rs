//! Compression towards clients by pingora's module, where the route wants it and it is worth it.

use http::{HeaderMap, header};
use pingora::{
    http::{RequestHeader, ResponseHeader},
    modules::http::compression::ResponseCompression,
    prelude::Session,
};

use super::{Gateway, record::RequestRecord};

impl Gateway {
    /// Before pingora's module reads Accept-Encoding.
    pub(super) fn enable_compression(session: &mut Session, record: &RequestRecord) {
        let Some(route) = &record.route else { return };
        let policy = &record.generation.config.routes[route.index.0].policy;
        let Some(compression) = &policy.compression else {
            return;
        };
        let level = compression.level;
        let accepted = session
            .req_header()
            .headers
            .get_all(header::ACCEPT_ENCODING);
        let accepted: Vec<&str> = accepted.iter().filter_map(|v| v.to_str().ok()).collect();
        let coding = preferred(&accepted.join(","));
        // pingora's module reads neither `q=0` nor `*`: it gets the answer instead of the question.
        let request = session.req_header_mut();
        match coding {
            Some(coding) => {
                let _ = request.insert_header(header::ACCEPT_ENCODING, coding);
            }
            None => {
                request.remove_header(&header::ACCEPT_ENCODING);
            }
        }
        let module = session
            .downstream_modules_ctx
            .get_mut::<ResponseCompression>();
        if let Some(module) = module {
            module.adjust_level(level);
        }
    }

    /// Leaves alone what is too short, or may not be transformed (RFC 9110, 7.7).
    pub(super) fn judge_compression(
        session: &mut Session,
        response: &ResponseHeader,
        record: &RequestRecord,
    ) {
        let Some(route) = &record.route else { return };
        let policy = &record.generation.config.routes[route.index.0].policy;
        let Some(compression) = &policy.compression else {
            return;
        };
        let headers = &response.headers;
        let length = headers.get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        let short = length.is_some_and(|length| length < compression.min_bytes);
        if !short && !says(headers, &header::CACHE_CONTROL, "no-transform") {
            return;
        }
        let module = session
            .downstream_modules_ctx
            .get_mut::<ResponseCompression>();
        if let Some(module) = module.filter(|module| module.is_header_phase()) {
            module.adjust_level(0);
        }
    }

    /// A route that compresses stores and gets what is not compressed.
    pub(super) fn ask_for_identity(request: &mut RequestHeader, record: &RequestRecord) {
        let Some(route) = &record.route else { return };
        let policy = &record.generation.config.routes[route.index.0].policy;
        if policy.compression.is_some() && policy.cache.is_some() {
            request.remove_header(&header::ACCEPT_ENCODING);
        }
    }
}

/// The coding a client likes best, of those we have (RFC 9110, 12.5.3); among equals the one that
/// compresses best.
fn preferred(accepted: &str) -> Option<&'static str> {
    const CODINGS: [&str; 3] = ["zstd", "br", "gzip"];
    /// In thousandths.
    fn quality(parameters: &str) -> Option<u32> {
        let Some(value) = parameters.trim().strip_prefix("q=") else {
            return Some(1000);
        };
        let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
        let digits = fraction.get(..fraction.len().min(3))?;
        let thousandths: u32 = format!("{digits:0<3}").parse().ok()?;
        Some((whole.parse::<u32>().ok()? * 1000 + thousandths).min(1000))
    }
    let mut qualities = [None; CODINGS.len()];
    let mut others = 0;
    for element in accepted.split(',') {
        let (name, parameters) = element.split_once(';').unwrap_or((element, ""));
        let (name, quality) = (name.trim(), quality(parameters).unwrap_or(0));
        if name == "*" {
            others = quality;
        }
        let place = CODINGS
            .iter()
            .position(|coding| name.eq_ignore_ascii_case(coding));
        if let Some(place) = place {
            qualities[place] = Some(quality);
        }
    }
    let mut best: Option<(u32, &str)> = None;
    for (coding, quality) in CODINGS.iter().zip(qualities) {
        let quality = quality.unwrap_or(others);
        if quality > best.map_or(0, |(quality, _)| quality) {
            best = Some((quality, coding));
        }
    }
    best.map(|(_, coding)| coding)
}

/// Whether a header has this word in it.
pub(super) fn says(headers: &HeaderMap, name: &header::HeaderName, word: &str) -> bool {
    let mut values = headers.get_all(name).iter();
    values.any(|value| {
        value
            .to_str()
            .is_ok_and(|value| value.to_ascii_lowercase().contains(word))
    })
}

#[cfg(test)]
mod tests {
    use super::preferred;

    #[test]
    fn the_client_decides_and_then_we_do() {
        for (accepted, coding) in [
            ("", None),
            ("identity", None),
            ("gzip;q=0", None),
            ("gzip", Some("gzip")),
            ("gzip, deflate, br, zstd", Some("zstd")),
            ("gzip, deflate, br", Some("br")),
            ("gzip;q=1.0, br;q=0.9", Some("gzip")),
            ("GZIP;q=0.001", Some("gzip")),
            ("gzip;q=0, br", Some("br")),
            ("*", Some("zstd")),
            ("zstd;q=0, *;q=0.5", Some("br")),
            ("*;q=0, gzip", Some("gzip")),
            ("br;q=x", None),
        ] {
            assert_eq!(preferred(accepted), coding, "{accepted}");
        }
    }
}
