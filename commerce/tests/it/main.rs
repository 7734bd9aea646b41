//! Whole-service tests: a real socket, a real client, a real file; for crashes, the real
//! executable. No test asserts how long something takes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on should say where and stop"
)]

mod audit;
mod catalogue;
mod experiments;
mod harness;
mod metrics;
mod orders;
mod overload;
mod process;
mod refusals;
