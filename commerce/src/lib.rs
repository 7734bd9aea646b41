//! Commerce: the order service behind the gateway.
//!
//! One node, one SQLite file, one thread that writes. Read the modules in the order a
//! purchase passes through them:
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
//!             ▼ bounded queue (full: 503)          ▼ bounded read pool
//!            store/writer ─ batch ─ BEGIN IMMEDIATE  store/read
//!             └─ store/place: key ► price ► deduct ► order, ledger, outbox ► answer
//!             │  COMMIT (synchronous=FULL), and only then the answers
//!             ▼
//!            audit            proves the file: stock, ledger, keys, totals
//! ```
//!
//! Dependencies point one way. [`money`], [`catalogue`], [`order`] and [`idempotency`] are
//! pure: no clock, no file, no socket. [`store`] knows nothing of HTTP: the caller hands it
//! a function that renders the answer, and the store keeps the rendered bytes with the
//! order. Only [`app`] sees everything. There is no global state, except the logger.
//!
//! Absent on purpose: a float, an unbounded queue, and a second connection that writes.

pub mod app;
pub mod audit;
pub mod catalogue;
pub mod config;
pub mod discount;
pub mod experiment;
pub mod http;
pub mod idempotency;
pub mod metrics;
pub mod money;
pub mod order;
pub mod store;
