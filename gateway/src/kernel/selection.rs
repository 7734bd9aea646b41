//! Which interfaces are observed, and which of them are the boundary.

use std::collections::HashMap;

use super::devices::{Device, Framing};

/// Names and patterns: `*` stands for any run of characters, `?` for one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Observed.
    pub include: Vec<String>,
    /// Not observed all the same.
    pub exclude: Vec<String>,
    /// Where bytes are credited to routes; empty: decided by how devices are stacked.
    pub boundary: Vec<String>,
}

impl Selection {
    /// Whether an interface of this name is observed.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        any(&self.include, name) && !any(&self.exclude, name)
    }

    /// Names without a pattern: these must exist.
    pub fn named(&self) -> impl Iterator<Item = &str> {
        let names = self.include.iter().map(String::as_str);
        names.filter(|name| !is_pattern(name))
    }

    /// The observed ones of these devices, each with whether it is inner: the gateway's bytes
    /// cross a boundary interface as well, and are credited there.
    ///
    /// A frame that crosses a stack of devices (a bridge and its port, a VLAN and what carries
    /// it) is counted on each that is observed. The gateway's are credited to their route on
    /// one: on the lowest observed device of the stack, or where `boundary` says so.
    #[must_use]
    pub fn choose(&self, devices: &[Device]) -> Vec<(Device, bool)> {
        let observed: HashMap<u32, &Device> = devices
            .iter()
            .filter(|device| self.wants(&device.name))
            .map(|device| (device.index, device))
            .collect();
        let has_observed_port = |index: u32| {
            observed
                .values()
                .any(|port| port.master == Some(index) && port.framing == Framing::Ethernet)
        };
        devices
            .iter()
            .filter(|device| observed.contains_key(&device.index))
            .map(|device| {
                let inner = if self.boundary.is_empty() {
                    let on_observed = device
                        .lower
                        .is_some_and(|index| observed.contains_key(&index));
                    on_observed || has_observed_port(device.index)
                } else {
                    !any(&self.boundary, &device.name)
                };
                (device.clone(), inner)
            })
            .collect()
    }
}

/// Whether a name in the configuration is a pattern.
#[must_use]
pub fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?'])
}

fn any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// Greedy, with one step back to the last `*`: linear enough for fifteen characters.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut at, mut from) = (0, 0);
    let mut star = None;
    while from < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, from));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[from] => {
                at += 1;
                from += 1;
            }
            _ => match star {
                Some((position, begin)) => {
                    star = Some((position, begin + 1));
                    at = position + 1;
                    from = begin + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn device(index: u32, name: &str, master: Option<u32>, lower: Option<u32>) -> Device {
        Device {
            index,
            name: name.into(),
            framing: Framing::Ethernet,
            master,
            lower,
        }
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth*", "eth0", true),
            ("eth*", "eth", true),
            ("eth*", "veth0", false),
            ("*", "anything", true),
            ("eth?", "eth9", true),
            ("eth?", "eth10", false),
            ("*a*b", "xaxaxb", true),
            ("*a*b", "xaxax", false),
            ("**", "x", true),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn excluded_is_not_observed() {
        let selection = Selection {
            include: texts(&["*"]),
            exclude: texts(&["veth*", "docker0"]),
            ..Selection::default()
        };
        assert!(selection.wants("eth0") && selection.wants("lo"));
        assert!(!selection.wants("veth12") && !selection.wants("docker0"));
        assert_eq!(selection.named().count(), 0);
    }

    #[test]
    fn a_stack_is_credited_on_its_lowest_observed_device() {
        let devices = [
            device(2, "eth0", Some(4), None),
            device(3, "eth1", None, None),
            device(4, "br0", None, None),
            device(5, "eth1.7", None, Some(3)),
            device(6, "br1", None, None),
        ];
        let inner = |include: &[&str], boundary: &[&str]| -> Vec<String> {
            let selection = Selection {
                include: texts(include),
                boundary: texts(boundary),
                ..Selection::default()
            };
            let chosen = selection.choose(&devices).into_iter();
            chosen
                .filter(|(_, inner)| *inner)
                .map(|(device, _)| device.name)
                .collect()
        };
        assert_eq!(inner(&["*"], &[]), ["br0", "eth1.7"]);
        assert_eq!(
            inner(&["br0", "eth1.7"], &[]),
            [""; 0],
            "nothing below is observed"
        );
        assert_eq!(inner(&["*"], &["br*", "eth1"]), ["eth0", "eth1.7"]);
    }
}
