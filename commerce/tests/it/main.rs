//! Whole-service tests: a real socket, a real client, a real file; for crashes, the real
//! executable. No test asserts how long something takes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on should say where and stop"
)]

mod audit;
mod catalogue;
mod consistency;
mod events;
mod experiments;
mod failover;
mod gate;
mod harness;
mod lifecycle;
mod metrics;
mod orders;
mod overload;
mod payments;
mod process;
mod refusals;
mod schemathesis;
