//! Commerce: the order service behind the gateway.
//!
//! One SQLite file on one machine, or PostgreSQL with a Redis gate for several; one thread that
//! writes. Read the modules in the order a purchase passes through them:
//!
//! ```text
//!  config ─► app ──────────── composition root: open, serve, drain
//!             │
//!  request ─► http            routes, limits, errors as problem documents
//!             ├─ http/observe   one count and one duration per request, even cancelled ones
//!             ├─ http/orders    parse once ─► idempotency key, order::Draft
//!             ├─ http/catalogue products as JSON and as a page
//!             └─ http/health    /livez /readyz /metrics
//!             │
//!             ▼ bounded queue (full: 503)          ▼ bounded pool
//!            store/writer ─ batch ─ one transaction  Store::read
//!             └─ command/keyed: key known? replay
//!                 └─ command/place, pay, cancel, refund: decide ► write ► event ► answer
//!             │  COMMIT on the disk, and only then the answers
//!             ├──► relay ──► the risk service, webhooks, the payment provider
//!             ▼
//!            audit            proves the database: stock, ledger, keys, totals, events
//! ```
//!
//! Dependencies point one way. [`money`], [`catalogue`], [`order`], [`payment`], [`trace`]
//! and [`idempotency`] are pure: no clock, no file, no socket. [`command`] knows nothing of
//! HTTP: the caller hands it a function that renders the answer, and the rendered bytes are
//! stored with the order. Only [`app`] sees everything. There is no global state, except the logger.
//!
//! Absent on purpose: a float, an unbounded queue, and a second connection that writes rows.

pub mod app;
pub mod audit;
pub mod campaign;
pub mod campaigns;
pub mod catalogue;
pub mod census;
pub mod command;
pub mod config;
pub mod discount;
pub mod event;
pub mod experiment;
pub mod fake;
pub mod gate;
pub mod group;
pub mod http;
pub mod idempotency;
pub mod membership;
pub mod metrics;
pub mod money;
mod mutant;
pub mod order;
pub mod payment;
pub mod provider;
pub mod read;
pub mod rehearsal;
pub mod relay;
pub mod store;
pub mod trace;
pub mod upkeep;
pub mod watch;
pub mod webhook;
