//! Asks the admin port of a running gateway, for the commands that need one.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Context as _;

use super::token::Token;
use crate::config;

/// One request with the token. Returns the status and the body.
///
/// # Errors
/// No gateway answers there, or the token cannot be read.
pub fn ask(admin: &config::Admin, method: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let token = Token::load(&admin.token_file)?;
    let address = reachable(admin.listen);
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
        .with_context(|| format!("no gateway answers at admin.listen {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: {}\r\ncontent-length: 0\r\n\
         connection: close\r\n\r\n",
        token.header()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the admin port did not answer in HTTP")?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok((
        status.context("the admin port did not answer with a status")?,
        body.to_owned(),
    ))
}

/// Any address means this host.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let mut address = listen;
    if listen.ip().is_unspecified() {
        address.set_ip(match listen {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}
