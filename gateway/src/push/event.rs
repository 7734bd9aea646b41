//! An outbox event as a CloudEvent. Numbers are text: sinks that sum floats would lose bytes.

use std::fmt::Write as _;

use chrono::DateTime;
use flow_abi::Direction;
use ring::digest::{Context, SHA256};
use serde_json::{Value, json};

use crate::{
    ledger::outbox::Event,
    owner::{Owner, OwnerKind},
};

/// `type` of every event.
pub const EVENT_TYPE: &str = "edgemeter.wire_bytes.v1";

/// `<boot id>:<map epoch>:<window sequence>:<hash of what it is about>`: the same in every
/// attempt, different for everything else this gateway ever says.
#[must_use]
pub fn id(event: &Event) -> String {
    let owner = &event.owner;
    let mut context = Context::new(&SHA256);
    for part in [
        owner.kind.as_str(),
        &owner.route,
        &owner.service,
        &owner.tenant,
        owner.leg.as_str(),
        &owner.endpoint,
        owner.quality.as_str(),
        &event.class.to_string(),
        direction(event.direction),
    ] {
        context.update(part.as_bytes());
        // So that no two lists of parts read the same.
        context.update(&[0]);
    }
    let hash = context.finish();
    let mut id = format!("{}:{}:", event.epoch, event.seq);
    for byte in &hash.as_ref()[..8] {
        let _ = write!(id, "{byte:02x}");
    }
    id
}

/// The event as JSON.
#[must_use]
pub fn cloud_event(event: &Event, source: &str) -> Value {
    let owner = &event.owner;
    json!({
        "specversion": "1.0",
        "type": EVENT_TYPE,
        "source": source,
        "id": id(event),
        "subject": subject(owner),
        // Inside the window, so that it falls into the right period at the sink.
        "time": time(event.window_start),
        "datacontenttype": "application/json",
        "data": {
            "wire_bytes": event.wire_bytes.to_string(),
            "kind": owner.kind.as_str(),
            "route": owner.route,
            "service": owner.service,
            "tenant": owner.tenant,
            "endpoint": owner.endpoint,
            "leg": owner.leg.as_str(),
            "class": if event.class_name.is_empty() { "none" } else { &event.class_name },
            "direction": direction(event.direction),
            "quality": owner.quality.as_str(),
            "window_seconds": event.window_seconds.to_string(),
        },
    })
}

fn time(unix_seconds: i64) -> String {
    let time = DateTime::from_timestamp(unix_seconds, 0).unwrap_or_default();
    time.format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Who pays: the tenant, or why there is none.
fn subject(owner: &Owner) -> String {
    match owner.kind {
        OwnerKind::Route => owner.tenant.clone(),
        kind => format!("({})", kind.as_str()),
    }
}

fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => "rx",
        Direction::Tx => "tx",
    }
}
