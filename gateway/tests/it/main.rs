//! The gateway's integration tests. They use the real kernel and need root: without it they
//! fail and say so; nothing is skipped.

// A test says what went wrong by failing; clippy.toml allows this in #[test] functions only, and
// the helpers they share are not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod acme;
mod alarm;
mod balance;
mod billing;
mod binding;
mod budgets;
mod churn;
mod classes;
mod connections;
mod content;
mod cost;
mod dashboards;
mod datagrams;
mod degraded;
mod differential;
mod disk;
mod drain;
mod echo;
mod example;
mod flows;
mod foreign;
mod harness;
mod hints;
mod http2;
mod identity;
mod interfaces;
mod kernel;
mod kernel_access;
mod lanes;
mod local;
mod memory;
mod newcomers;
mod origin;
mod otlp;
mod packets;
mod profile;
mod protection;
mod push;
mod reload;
mod reloaded;
mod remote;
mod replay;
mod restart;
mod routes;
mod routing;
mod streams;
mod suites;
mod supervised;
mod talk;
mod tls;
mod transport;
mod upgrade;
mod upstreams;
mod wire;

/// Fails, never skips: a privileged test that did not run has proved nothing.
fn require_root() {
    xtask::host::require_root("this test loads BPF programs and makes namespaces; it").unwrap();
}
