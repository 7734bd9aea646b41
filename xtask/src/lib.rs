//! What a contributor's commands are made of. The executable only chooses among them; the
//! gateway's integration tests borrow the privileged pieces:
//!
//! - [`host`]: is the machine fit for it, and make it so.
//! - [`netns`]: hosts and cables made of kernel namespaces, gone when dropped.
//! - [`capture`]: what the far end of a cable really received: the ground truth.
//! - [`load`], [`certificate`], [`exposition`]: clients that check every answer, and the metrics
//!   page read back.
//! - [`server`]: PostgreSQL and Redis of one's own.
//! - [`dashboards`]: what the panels and rules ask for.
//!
//! The rest are commands: [`ebpf`] builds and checks the committed BPF object, [`test`] is what
//! CI runs, [`dev`] rebuilds and restarts while you edit, [`demo`] shows the product working,
//! [`bench`] measures it beside its peers. [`python`] brings tools that live on PyPI, [`browser`]
//! a real browser.
//!
//! Nothing here is skipped for lack of a privilege or a tool: it is installed, or the command
//! fails and says what is missing. A test that did not run has not passed.

pub mod bench;
pub mod browser;
pub mod capture;
pub mod certificate;
pub mod dashboards;
pub mod demo;
pub mod dev;
pub mod ebpf;
pub mod exposition;
pub mod host;
pub mod load;
pub mod mutants;
pub mod netns;
pub mod python;
pub mod server;
pub mod test;
