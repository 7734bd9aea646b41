//! One order: account, authorizations, challenge, certificate.

use std::{future::Future, path::Path, pin::Pin, sync::Arc};

use anyhow::Context as _;
use bytes::Bytes;
use http::Request;
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, BodyWrapper, BytesResponse, ChallengeType,
    Error, HttpClient, Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject as _},
};

use super::{Challenges, file::write_private};
use crate::config::Acme;

/// Orders a certificate for all names: the key, then the chain, in PEM.
///
/// # Errors
/// In the server's words where it said any.
pub(super) async fn order(
    acme: &Acme,
    account: &Path,
    challenges: &Challenges,
) -> anyhow::Result<String> {
    let account = self::account(acme, account).await?;
    let names: Vec<Identifier> = acme
        .domains
        .iter()
        .map(|name| Identifier::Dns(name.to_string()))
        .collect();
    let mut order = account.new_order(&NewOrder::new(&names)).await?;
    let mut answering = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        match authorization.status {
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            ref other => anyhow::bail!("an authorization is {other:?}"),
        }
        let mut challenge = authorization
            .challenge(ChallengeType::Http01)
            .context("the server offers no http-01 challenge")?;
        let answer = challenge.key_authorization();
        answering.push(challenges.hold(&challenge.token, answer.as_str()));
        challenge.set_ready().await?;
    }
    let patience = RetryPolicy::default();
    let status = order.poll_ready(&patience).await;
    if !matches!(status, Ok(OrderStatus::Ready)) {
        let why = refusals(&mut order).await;
        return Err(match status {
            Ok(status) => anyhow::anyhow!("the order is {status:?}: {why}"),
            Err(error) => anyhow::Error::from(error).context(why),
        });
    }
    drop(answering);
    let key = rcgen::KeyPair::generate()?;
    let names: Vec<String> = acme.domains.iter().map(|name| name.to_string()).collect();
    let mut request = rcgen::CertificateParams::new(names)?;
    request.distinguished_name = rcgen::DistinguishedName::new();
    let request = request.serialize_request(&key)?;
    order.finalize_csr(request.der()).await?;
    let chain = order.poll_certificate(&patience).await?;
    Ok(format!("{}{chain}", key.serialize_pem()))
}

/// Whether the server refused with this problem of RFC 8555, 6.7.
pub(super) fn is(error: &anyhow::Error, problem: &str) -> bool {
    error.chain().any(|cause| match cause.downcast_ref() {
        Some(Error::Api(said)) => {
            let kind = said.r#type.as_deref();
            kind.and_then(|kind| kind.strip_prefix("urn:ietf:params:acme:error:")) == Some(problem)
        }
        _ => false,
    })
}

/// What the server says about the names it did not authorize.
async fn refusals(order: &mut Order) -> String {
    let mut words = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let Ok(state) = authorization.refresh().await else {
            continue;
        };
        let errors = state.challenges.iter().filter_map(|c| c.error.as_ref());
        words.extend(errors.map(|error| format!("{}: {error}", state.identifier())));
    }
    words.join("; ")
}

/// The account of an earlier order, or a new one, kept from then on.
async fn account(acme: &Acme, file: &Path) -> anyhow::Result<Account> {
    let client =
        || Ok::<_, anyhow::Error>(Account::builder_with_http(Box::new(Server::new(acme)?)));
    if let Ok(text) = std::fs::read_to_string(file) {
        let credentials: AccountCredentials = serde_json::from_str(&text)
            .with_context(|| format!("{}: no account; fix: delete it", file.display()))?;
        return Ok(client()?.from_credentials(credentials).await?);
    }
    let contact: Vec<&str> = acme.contact.iter().map(|address| &**address).collect();
    let new = NewAccount {
        contact: &contact,
        terms_of_service_agreed: true,
        only_return_existing: false,
    };
    let created = client()?.create(&new, acme.directory.clone(), None);
    let (account, credentials) = created.await.context("the server makes no account")?;
    write_private(file, &serde_json::to_string(&credentials)?)?;
    Ok(account)
}

/// The ACME server, trusted as configured.
struct Server(Client<HttpsConnector<HttpConnector>, BodyWrapper<Bytes>>);

impl Server {
    fn new(acme: &Acme) -> anyhow::Result<Self> {
        let connector = match &acme.authorities {
            None => hyper_rustls::HttpsConnectorBuilder::new().with_native_roots()?,
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in CertificateDer::pem_file_iter(path)? {
                    roots.add(certificate?)?;
                }
                let config =
                    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
                        .with_safe_default_protocol_versions()?
                        .with_root_certificates(roots)
                        .with_no_client_auth();
                hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(config)
            }
        };
        let connector = connector.https_only().enable_http1().build();
        Ok(Self(Client::builder(TokioExecutor::new()).build(connector)))
    }
}

impl HttpClient for Server {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let response = self.0.request(request);
        Box::pin(async move {
            match response.await {
                Ok(response) => Ok(BytesResponse::from(response)),
                Err(error) => Err(Error::Other(Box::new(error))),
            }
        })
    }
}
