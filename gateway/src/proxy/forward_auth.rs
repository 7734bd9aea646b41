//! Forward authentication: another service is asked about each request, with its headers and
//! without its body. 2xx lets it through; any other answer is the client's answer.

use std::{net::IpAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use pingora::http::RequestHeader;

use crate::config::ForwardAuth;

/// Of an answer that goes to the client.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// What of the answer goes to the client with it.
const TO_CLIENT: [HeaderName; 5] = [
    header::LOCATION,
    header::WWW_AUTHENTICATE,
    header::SET_COOKIE,
    header::CONTENT_TYPE,
    header::CACHE_CONTROL,
];

/// Asks one service.
pub struct Asker {
    service: ForwardAuth,
    client: Client<HttpConnector, Empty<Bytes>>,
}

/// What it says.
pub enum Answer {
    /// Let it through, with these headers for the service behind.
    Allowed(Vec<(HeaderName, HeaderValue)>),
    /// This is the client's answer.
    Denied(Response<Bytes>),
    /// It did not say anything.
    Failed(String),
}

/// Of the request asked about.
pub struct About<'r> {
    /// Its header.
    pub request: &'r RequestHeader,
    /// Its host.
    pub host: &'r str,
    /// Whose it is.
    pub client: Option<IpAddr>,
    /// Whether it came over TLS.
    pub tls: bool,
}

impl Asker {
    /// Asks with pooled connections.
    #[must_use]
    pub fn new(service: ForwardAuth) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(service.timeout));
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(10))
            .build(connector);
        Self { service, client }
    }

    /// What it is configured to be.
    #[must_use]
    pub fn service(&self) -> &ForwardAuth {
        &self.service
    }

    /// Asks about a request.
    pub async fn ask(&self, about: &About<'_>) -> Answer {
        let asked = tokio::time::timeout(self.service.timeout, self.exchange(about)).await;
        let response = match asked {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Answer::Failed(error),
            Err(_) => return Answer::Failed("no answer in time".to_owned()),
        };
        if response.status().is_success() {
            let headers = self.service.response_headers.iter();
            let copied = headers.filter_map(|name| {
                let value = response.headers().get(name)?;
                Some((name.clone(), value.clone()))
            });
            return Answer::Allowed(copied.collect());
        }
        let (parts, body) = response.into_parts();
        let mut denied = Response::new(body);
        *denied.status_mut() = parts.status;
        for name in TO_CLIENT {
            for value in parts.headers.get_all(&name) {
                denied.headers_mut().append(name.clone(), value.clone());
            }
        }
        Answer::Denied(denied)
    }

    async fn exchange(&self, about: &About<'_>) -> Result<Response<Bytes>, String> {
        let response = self
            .client
            .request(self.question(about)?)
            .await
            .map_err(|error| error.to_string())?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, BODY_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| error.to_string())?;
        Ok(Response::from_parts(parts, body.to_bytes()))
    }

    fn question(&self, about: &About<'_>) -> Result<Request<Empty<Bytes>>, String> {
        let uri = Uri::builder()
            .scheme("http")
            .authority(self.service.address.to_string())
            .path_and_query(&*self.service.path)
            .build()
            .map_err(|error| error.to_string())?;
        let path = about.request.uri.path_and_query();
        let mut question = Request::get(uri)
            .header("x-forwarded-method", about.request.method.as_str())
            .header("x-forwarded-uri", path.map_or("/", |path| path.as_str()))
            .header("x-forwarded-host", about.host)
            .header(
                "x-forwarded-proto",
                if about.tls { "https" } else { "http" },
            );
        if let Some(client) = about.client {
            question = question.header("x-forwarded-for", client.to_string());
        }
        for name in &self.service.request_headers {
            for value in about.request.headers.get_all(name) {
                question = question.header(name.clone(), value.clone());
            }
        }
        question
            .body(Empty::new())
            .map_err(|error| error.to_string())
    }
}
