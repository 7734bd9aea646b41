//! What differs between two configuration files, and what it takes to bring the change into force.
//!
//! The files are compared as written: tables by field, arrays of named tables by name. So a field
//! that is added to the configuration later is compared without anything to do here, except to say
//! in [`RESTART`] when it cannot change while the gateway runs.

use std::fmt;

use toml::{Table, Value};

/// Fields that are fixed for the life of a process, and why. A prefix of the field's path without
/// names: `listeners.address`. Every other field is in [`RELOAD`].
const RESTART: &[(&str, &str)] = &[
    ("gateway", "threads and the ledger belong to the process"),
    ("retention", "the ledger's upkeep belongs to the process"),
    ("budgets", "what they used is known to the process"),
    ("push", "sinks are fixed when the ledger is opened"),
    ("admin", "the admin port is bound once"),
    (
        "observe.enabled",
        "the kernel side is there from the start or not",
    ),
    ("observe.attach", "programs are attached in one way"),
    ("observe.bpffs", "the maps are pinned there"),
    ("observe.flows_max", "the maps are made once"),
    ("observe.connections_max", "the maps are made once"),
    ("observe.accounts_max", "the maps are made once"),
    (
        "observe.collect_interval_ms",
        "the collector is started once",
    ),
    ("observe.required", "it is asked at the start"),
    ("observe.kernel_log", "the programs are loaded once"),
    ("observe.namespaces", "a thread for each is started once"),
    ("access_log", "the log is opened once"),
    ("cache", "the store is opened once"),
    ("tracing", "the exporter is started once"),
    ("prices", "past bytes would be priced anew"),
    ("listeners.address", "sockets are bound once"),
];

/// Fields that a reload brings into force, and from when on: each is read from the generation in
/// force, never kept by what the process began with. A prefix, as above.
#[cfg(test)]
const RELOAD: &[(&str, &str)] = &[
    ("observe.interfaces", "the next frame"),
    ("observe.exclude", "the next frame"),
    ("observe.boundary", "the next frame"),
    (
        "classes",
        "the next frame, or the next connection of the gateway's",
    ),
    ("listeners.http2", "the next connection"),
    ("listeners.tls", "the next connection"),
    ("listeners.access", "the next connection"),
    ("listeners.limits", "the next connection or request"),
    ("listeners.trusted_proxies", "the next request"),
    ("listeners.proxy_protocol_from", "the next connection"),
    ("upstreams", "the next request"),
    ("experiments", "the next request"),
    ("routes", "the next request"),
    ("tokens", "the next request"),
    ("forward_auth", "the next request"),
    ("rate_limit_store", "the next request"),
];

/// What it takes to bring a change into force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A reload.
    Reload,
    /// A restart or an upgrade, and why.
    Restart(&'static str),
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Such as `routes[orders].path`.
    pub field: String,
    /// `+ …`, `- …` or `… -> …`, in TOML.
    pub what: String,
    /// What it takes.
    pub effect: Effect,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            field,
            what,
            effect,
        } = self;
        match effect {
            Effect::Reload => write!(f, "{field}: {what}"),
            Effect::Restart(why) => write!(f, "{field}: {what} (needs restart or upgrade: {why})"),
        }
    }
}

/// Two texts that were both accepted as configurations.
pub(super) fn changes(old: &str, new: &str) -> Vec<Change> {
    let parse = |text: &str| text.parse::<Table>().unwrap_or_default();
    let mut changes = Vec::new();
    tables(&parse(old), &parse(new), &Place::default(), &mut changes);
    changes
}

/// Where a difference is: as shown, and as looked up in [`RESTART`].
#[derive(Clone, Default)]
struct Place {
    shown: String,
    plain: String,
}

impl Place {
    fn key(&self, key: &str) -> Self {
        let join = |path: &str| match path {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        };
        Self {
            shown: join(&self.shown),
            plain: join(&self.plain),
        }
    }

    fn element(&self, name: &str) -> Self {
        Self {
            shown: format!("{}[{name}]", self.shown),
            plain: self.plain.clone(),
        }
    }

    fn change(&self, what: String) -> Change {
        let under = |prefix: &str| {
            let rest = self.plain.strip_prefix(prefix);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        // A listener that comes or goes is more than any of its fields.
        let listener = self.plain == "listeners" && self.shown != "listeners";
        let found = RESTART.iter().find(|(prefix, _)| under(prefix));
        Change {
            field: self.shown.clone(),
            what,
            effect: match found {
                Some((_, why)) => Effect::Restart(why),
                None if listener => Effect::Restart("sockets are bound once"),
                None if self.plain == "observe" => {
                    Effect::Restart("the kernel side is there from the start or not")
                }
                None => Effect::Reload,
            },
        }
    }
}

fn tables(old: &Table, new: &Table, at: &Place, changes: &mut Vec<Change>) {
    for (key, old) in old {
        let at = at.key(key);
        match new.get(key) {
            Some(new) => values(old, new, &at, changes),
            None => gone(old, &at, changes),
        }
    }
    for (key, new) in new.iter().filter(|(key, _)| !old.contains_key(*key)) {
        come(new, &at.key(key), changes);
    }
}

fn values(old: &Value, new: &Value, at: &Place, changes: &mut Vec<Change>) {
    match (old, new) {
        (Value::Table(old), Value::Table(new)) => tables(old, new, at, changes),
        (Value::Array(old), Value::Array(new)) => match (named(old), named(new)) {
            (Some(old), Some(new)) => elements(&old, &new, at, changes),
            _ if old == new => {}
            _ => changes.push(at.change(format!(
                "{} -> {}",
                Value::Array(old.clone()),
                Value::Array(new.clone())
            ))),
        },
        _ if old == new => {}
        _ => changes.push(at.change(format!("{old} -> {new}"))),
    }
}

/// The elements of an array of tables by their names; `None` for any other array.
fn named(array: &[Value]) -> Option<Vec<(&str, &Value)>> {
    let name = |value: &Value| -> Option<()> {
        let table = value.as_table()?;
        table.get("name").or_else(|| table.get("id"))?.as_str()?;
        Some(())
    };
    array.iter().try_for_each(name)?;
    let named = array.iter().filter_map(|value| {
        let name = value.get("name").or_else(|| value.get("id"))?;
        Some((name.as_str()?, value))
    });
    Some(named.collect())
}

fn elements(old: &[(&str, &Value)], new: &[(&str, &Value)], at: &Place, changes: &mut Vec<Change>) {
    let find = |list: &[(&str, &Value)], name: &str| list.iter().position(|(n, _)| *n == name);
    for (name, old) in old {
        let at = at.element(name);
        match find(new, name) {
            Some(index) => values(old, new[index].1, &at, changes),
            None => gone(old, &at, changes),
        }
    }
    for (name, new) in new.iter().filter(|(name, _)| find(old, name).is_none()) {
        come(new, &at.element(name), changes);
    }
    let common = |these: &[(&str, &Value)], those: &[(&str, &Value)]| -> Vec<String> {
        let both = these.iter().filter(|(name, _)| find(those, name).is_some());
        both.map(|(name, _)| (*name).to_owned()).collect()
    };
    let (before, after) = (common(old, new), common(new, old));
    if before != after {
        changes.push(at.change(format!(
            "in another order: {} -> {}",
            before.join(" "),
            after.join(" ")
        )));
    }
}

fn gone(value: &Value, at: &Place, changes: &mut Vec<Change>) {
    each(value, at, "-", changes);
}

fn come(value: &Value, at: &Place, changes: &mut Vec<Change>) {
    each(value, at, "+", changes);
}

/// An array of named tables comes or goes element by element.
fn each(value: &Value, at: &Place, sign: &str, changes: &mut Vec<Change>) {
    match value.as_array().and_then(|array| named(array)) {
        Some(elements) if !elements.is_empty() => {
            for (name, value) in elements {
                changes.push(at.element(name).change(format!("{sign} {value}")));
            }
        }
        _ => changes.push(at.change(format!("{sign} {value}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = r#"
        [gateway]
        threads = 2
        [[listeners]]
        name = "a"
        address = "127.0.0.1:80"
        [[upstreams]]
        name = "up"
        peers = ["127.0.0.1:90"]
        [[routes]]
        name = "first"
        upstream = "up"
        [[routes]]
        name = "second"
        upstream = "up"
        path = { prefix = "/two" }
    "#;

    fn lines(new: &str) -> Vec<String> {
        changes(OLD, new).iter().map(Change::to_string).collect()
    }

    #[test]
    fn every_field_is_reloaded_or_needs_a_restart() {
        let is_under = |path: &str, prefix: &str| {
            path.strip_prefix(prefix)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        for &(path, _) in super::super::fields::all() {
            // Who comes, goes or has another name is looked at by element, and needs a restart.
            if ["listeners", "listeners.name"].contains(&path) {
                continue;
            }
            let reload = RELOAD.iter().any(|(prefix, _)| is_under(path, prefix));
            let change = Place {
                shown: path.to_owned(),
                plain: path.to_owned(),
            }
            .change(String::new());
            let restart = matches!(change.effect, Effect::Restart(_));
            assert!(
                reload != restart,
                "{path}: reload {reload}, restart {restart}"
            );
        }
        for (prefix, _) in RESTART.iter().chain(RELOAD) {
            let mut paths = super::super::fields::all().map(|&(path, _)| path);
            assert!(paths.any(|path| is_under(path, prefix)), "{prefix}");
        }
    }

    #[test]
    fn nothing_changed() {
        assert!(lines(OLD).is_empty());
        // Order of fields, comments and spelling of tables are not differences.
        let spelt = OLD.replace("threads = 2", "threads = 0x2 # two");
        assert!(lines(&spelt).is_empty());
    }

    #[test]
    fn what_a_reload_can_do() {
        let new = OLD
            .replace("/two", "/zwei")
            .replace("[\"127.0.0.1:90\"]", "[\"127.0.0.1:91\"]");
        let new = format!("{new}\n[[routes]]\nname = \"third\"\nupstream = \"up\"\n");
        assert_eq!(
            lines(&new),
            [
                r#"routes[second].path.prefix: "/two" -> "/zwei""#,
                r#"routes[third]: + { name = "third", upstream = "up" }"#,
                r#"upstreams[up].peers: ["127.0.0.1:90"] -> ["127.0.0.1:91"]"#,
            ]
        );
    }

    #[test]
    fn the_order_of_routes_is_a_difference() {
        let first = "[[routes]]\n        name = \"first\"\n        upstream = \"up\"\n";
        let new = OLD.replace(first, "");
        let new = format!("{new}\n{first}");
        assert_eq!(
            lines(&new),
            ["routes: in another order: first second -> second first"]
        );
    }

    #[test]
    fn what_needs_a_restart_says_why() {
        let new = OLD
            .replace("threads = 2", "threads = 3")
            .replace(":80", ":81");
        let new = format!("{new}\n[[listeners]]\nname = \"b\"\naddress = \"127.0.0.1:82\"\n");
        let effects: Vec<(String, bool)> = changes(OLD, &new)
            .into_iter()
            .map(|change| {
                let restart = matches!(change.effect, Effect::Restart(_));
                (change.field, restart)
            })
            .collect();
        assert_eq!(
            effects,
            [
                ("gateway.threads".to_owned(), true),
                ("listeners[a].address".to_owned(), true),
                ("listeners[b]".to_owned(), true),
            ]
        );
        assert!(lines(&new)[0].ends_with(
            "2 -> 3 (needs restart or upgrade: threads and the ledger belong to the process)"
        ));
    }
}
