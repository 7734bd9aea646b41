//! The lean lane: requests that need nothing but routing and forwarding, moved without pingora's
//! header maps, channels and per-request tasks. `serve` speaks HTTP/1.1 to the client, `h2` HTTP/2.
//!
//! One core of routing, policy, records and attribution; two ways of moving bytes under it. The
//! lane takes a request when its head is plain HTTP/1.1 with a route that asks for nothing more,
//! and a body that fits a buffer. Anything else, a malformed head too, goes to the full lane
//! with every byte read so far, and the connection stays there.
//!
//! ```text
//! first bytes → head → route, record, claim → peer → kept or new connection
//!            → head and body in one write → response head → one write → relay → record in Drop
//! ```
//!
//! Deliberately absent: HTTP/1.0, upgrades, `Expect`, streaming request bodies, HTTP/2 upstreams.

mod admit;
mod buffers;
mod chunks;
mod exchange;
mod fit;
mod forward;
mod h2;
mod head;
mod pool;
mod relay;
mod serve;
mod timer;

pub use buffers::Buffer;
pub use fit::Fit;
pub use pool::Pools;
pub use serve::{Lane, Stay};
