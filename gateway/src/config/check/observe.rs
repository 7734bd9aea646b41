//! `[observe]` and `[access_log]`: interfaces, namespaces and files.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Checker, Seen};
use crate::config::raw::{RawAccessLog, RawObserve, Text};
use crate::config::{AccessLog, AccessLogTarget, Attach, KernelLog, NetworkNamespace, Observe};

/// Where `ip netns` keeps the names.
const NAMESPACE_DIRECTORY: &str = "/run/netns";
const DEFAULT_BPFFS: &str = "/sys/fs/bpf/edgemeter";
/// The longest interface name Linux allows (`IFNAMSIZ` less its NUL).
const INTERFACE_LENGTH_MAX: usize = 15;

impl Checker<'_> {
    /// `Some(None)` when disabled; the rest of the table is checked all the same.
    pub(super) fn observe(
        &mut self,
        at: Range<usize>,
        raw: &RawObserve,
    ) -> Option<Option<Observe>> {
        let enabled = raw.enabled.unwrap_or(true);
        let interfaces = match &raw.interfaces {
            Some(interfaces) => {
                let mut seen = Seen::default();
                let names: Vec<Option<String>> = interfaces
                    .get_ref()
                    .iter()
                    .enumerate()
                    .map(|(index, text)| {
                        let field = format!("observe.interfaces[{index}]");
                        self.interface(text, &field, &mut seen)
                    })
                    .collect();
                if names.is_empty() && enabled {
                    let fix = r#"write `interfaces = ["eth0"]` or `enabled = false`"#;
                    self.report(interfaces.span(), "observe.interfaces", "is empty", fix);
                }
                names.into_iter().collect()
            }
            None if enabled => {
                let fix = r#"add `interfaces = ["eth0"]` or `enabled = false`"#;
                self.report(at, "observe.interfaces", "is missing", fix);
                None
            }
            None => Some(Vec::new()),
        };
        let exclude = self.interface_patterns(&raw.exclude, "observe.exclude");
        let boundary = self.interface_patterns(&raw.boundary, "observe.boundary");
        let namespaces = self.network_namespaces(&raw.namespaces);
        let attach = self.choice_or(
            raw.attach.as_ref(),
            "observe.attach",
            &[
                ("auto", Attach::Auto),
                ("tcx", Attach::Tcx),
                ("clsact", Attach::Clsact),
            ],
        );
        let kernel_log = self.choice_or(
            raw.kernel_log.as_ref(),
            "observe.kernel_log",
            &[
                ("off", KernelLog::Off),
                ("error", KernelLog::Error),
                ("warn", KernelLog::Warn),
                ("info", KernelLog::Info),
                ("debug", KernelLog::Debug),
            ],
        );
        let bpffs = match &raw.bpffs {
            Some(text) if !text.get_ref().starts_with('/') => {
                let fix = format!("write `bpffs = \"{DEFAULT_BPFFS}\"`");
                self.report(text.span(), "observe.bpffs", "is not an absolute path", fix);
                None
            }
            Some(text) => Some(text.get_ref().into()),
            None => Some(PathBuf::from(DEFAULT_BPFFS)),
        };
        let flows = raw.flows_max.as_ref();
        let flows_max = self.number(flows, "observe.flows_max", 1_024..=16_777_216, 262_144);
        let slots = 64..=1_048_576;
        let connections = raw.connections_max.as_ref();
        let connections_max = self.number(
            connections,
            "observe.connections_max",
            slots.clone(),
            16_384,
        );
        let accounts = raw.accounts_max.as_ref();
        let accounts_max = self.number(accounts, "observe.accounts_max", slots, 16_384);
        let interval = raw.collect_interval_ms.as_ref();
        let interval = self.number(interval, "observe.collect_interval_ms", 50..=60_000, 1_000);
        let observe = Observe {
            interfaces: interfaces?,
            exclude: exclude?,
            boundary: boundary?,
            namespaces: namespaces?,
            attach: attach?,
            bpffs: bpffs?,
            flows_max: flows_max?,
            connections_max: connections_max?,
            accounts_max: accounts_max?,
            collect_interval: Duration::from_millis(interval?),
            required: raw.required.unwrap_or(false),
            kernel_log: kernel_log?,
        };
        Some(enabled.then_some(observe))
    }

    fn interface_patterns(&mut self, texts: &[Text], list: &str) -> Option<Vec<String>> {
        let mut seen = Seen::default();
        let names: Vec<Option<String>> = texts
            .iter()
            .enumerate()
            .map(|(index, text)| self.interface(text, &format!("{list}[{index}]"), &mut seen))
            .collect();
        names.into_iter().collect()
    }

    /// A name below `/run/netns`, or a path such as `/proc/4711/ns/net`.
    fn network_namespaces(&mut self, texts: &[Text]) -> Option<Vec<NetworkNamespace>> {
        let mut seen = Seen::default();
        let mut namespaces = Vec::new();
        let mut good = true;
        for (index, text) in texts.iter().enumerate() {
            let field = format!("observe.namespaces[{index}]");
            let word = text.get_ref();
            let path = if word.starts_with('/') {
                PathBuf::from(word)
            } else {
                Path::new(NAMESPACE_DIRECTORY).join(word)
            };
            // /proc/4711/ns/net is called proc-4711-ns-net.
            let name = word.trim_start_matches('/').replace('/', "-");
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
            let is_path = word.starts_with('/');
            if name.is_empty() || !name.chars().all(plain) || (!is_path && word.contains('/')) {
                let wrong = format!("\"{word}\" cannot name a network namespace");
                let fix = "write a name that `ip netns` lists, of letters, digits, - and _, or an \
                           absolute path";
                self.report(text.span(), field, wrong, fix);
                good = false;
                continue;
            }
            let unique = self.unique(&mut seen, name.clone(), text.span(), &field, "delete it");
            good &= unique.is_some();
            namespaces.push(NetworkNamespace { name, path });
        }
        good.then_some(namespaces)
    }

    fn interface<'r>(
        &mut self,
        text: &'r Text,
        field: &str,
        seen: &mut Seen<&'r str>,
    ) -> Option<String> {
        let name = text.get_ref();
        let valid = (1..=INTERFACE_LENGTH_MAX).contains(&name.len())
            && !matches!(name.as_str(), "." | "..")
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0');
        if !valid {
            let wrong = format!("\"{name}\" cannot be the name of a network interface");
            let fix = "write a name that `ip link` lists, such as \"eth0\"";
            self.report(text.span(), field, wrong, fix);
            return None;
        }
        self.unique(seen, name.as_str(), text.span(), field, "delete it")?;
        Some(name.clone())
    }

    pub(super) fn access_log(&mut self, raw: &RawAccessLog) -> Option<AccessLog> {
        let target = match raw.path.get_ref().as_str() {
            "-" => Some(AccessLogTarget::StandardOutput),
            _ => self
                .path(&raw.path, "access_log.path")
                .map(AccessLogTarget::File),
        };
        let queue = raw.queue.as_ref();
        let queue = self.number(queue, "access_log.queue", 1..=16_777_216, 65_536);
        let settle = raw.settle_ms.as_ref();
        let settle = self.number(settle, "access_log.settle_ms", 0..=600_000, 5_000);
        Some(AccessLog {
            target: target?,
            queue: queue?,
            settle: Duration::from_millis(settle?),
        })
    }
}
