//! Whole-service tests: a real socket, a real client, a real file; for crashes, the real
//! executable. No test asserts how long something takes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on should say where and stop"
)]

mod audit;
mod campaigns;
mod catalogue;
mod consistency;
mod events;
mod experiments;
mod failover;
mod gate;
mod gateway;
mod groups;
mod harness;
mod lifecycle;
mod listing;
mod members;
mod metrics;
mod orders;
mod overload;
mod page;
mod payments;
mod process;
mod refusals;
mod retention;
mod schemathesis;
