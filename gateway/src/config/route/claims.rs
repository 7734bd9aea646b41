//! No two routes for the same requests.

use std::collections::{HashMap, HashSet};

use http::Method;

use super::{Match, Route};
use crate::config::{HostPattern, ListenerIndex, Name};

/// What one route says about requests at the finest grain the router distinguishes. Two routes
/// with one claim in common would leave the order of the file to decide: refused.
type Claim = (ListenerIndex, Option<HostPattern>, Match, Option<Method>);

/// Who claims what so far.
#[derive(Default)]
pub(super) struct Claims(HashMap<Claim, (usize, Name)>);

impl Claims {
    /// Enters a route's claims; a sentence for every earlier route that has one of them.
    pub(super) fn claim(&mut self, index: usize, route: &Route, listeners: &[&str]) -> Vec<String> {
        let mut conflicts = Vec::new();
        let mut reported = HashSet::new();
        let hosts = one_or_any(&route.hosts);
        for one in &route.matches {
            let bare = Match {
                methods: Vec::new(),
                ..one.clone()
            };
            for &listener in &route.listeners {
                for host in &hosts {
                    for method in one_or_any(&one.methods) {
                        let claim = (listener, host.clone(), bare.clone(), method.clone());
                        let (first, first_name) = self
                            .0
                            .entry(claim)
                            .or_insert_with(|| (index, route.name.clone()));
                        if *first != index && reported.insert(*first) {
                            conflicts.push(format!(
                                "claims the same requests as routes[{first}] \"{first_name}\": listener {}, {}, path {}, {}",
                                listeners.get(listener.0).unwrap_or(&"?"),
                                host.as_ref().map_or("any host".into(), |host| format!("host {host}")),
                                one.path,
                                method.as_ref().map_or("any method".into(), |method| format!("method {method}")),
                            ));
                        }
                    }
                }
            }
        }
        conflicts
    }
}

fn one_or_any<T: Clone>(values: &[T]) -> Vec<Option<T>> {
    if values.is_empty() {
        vec![None]
    } else {
        values.iter().cloned().map(Some).collect()
    }
}
