//! `edgemeter doctor`: what this machine can do for the gateway, and what is lost without it.

use std::{fmt::Write as _, path::Path};

use crate::{
    app::{connections_max, kernel_options, selection},
    config::Config,
    descriptors::Limit,
    kernel::{self, Framing, Options, PinDirectory, Selection, devices},
    ledger::Ledger,
};

const CAP_NET_ADMIN: u32 = 12;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// One finding.
struct Finding {
    what: &'static str,
    /// What was found, or why it is missing.
    result: Result<String, String>,
    /// What is lost without it.
    lost: &'static str,
    /// The gateway counts nothing without it.
    required: bool,
}

/// Looks at everything, and says it line by line. True when the gateway can count.
#[must_use]
pub fn examine(config: &Config) -> (String, bool) {
    let mut findings = vec![
        Finding {
            what: "kernel",
            result: kernel_at_least(5, 15).map(|found| format!("{found}; the least is 5.15")),
            lost: "the programs need Linux 5.15",
            required: true,
        },
        Finding {
            what: "BTF",
            result: exists("/sys/kernel/btf/vmlinux"),
            lost: "per-socket storage, so which request owns a sent byte",
            required: true,
        },
        Finding {
            what: "capabilities",
            result: capabilities(),
            lost: "loading the programs",
            required: true,
        },
        Finding {
            what: "TCX",
            result: kernel_at_least(6, 6),
            lost: "links that survive by themselves; clsact filters are used instead",
            required: false,
        },
    ];
    if let Some(observe) = &config.observe {
        findings.push(Finding {
            what: "bpffs",
            result: PinDirectory::open(&observe.bpffs)
                .map(|pins| pins.root().display().to_string())
                .map_err(|error| error.to_string()),
            lost: "counters over a restart",
            required: true,
        });
        findings.push(Finding {
            what: "programs",
            result: programs(&kernel_options(observe)),
            lost: "everything the kernel counts",
            required: true,
        });
        findings.extend(features(&kernel_options(observe)));
        findings.push(Finding {
            what: "older sockets",
            result: kernel::diag::connections()
                .map(|there| format!("sock_diag lists {} connections", there.len()))
                .map_err(|error| format!("sock_diag: {error} (CONFIG_INET_DIAG)")),
            lost: "connections from before the start in the list of connections",
            required: false,
        });
        findings.extend(interfaces(&selection(observe)));
        for namespace in &observe.namespaces {
            findings.push(Finding {
                what: "namespace",
                result: std::fs::File::open(&namespace.path)
                    .map(|_| format!("{}: {}", namespace.name, namespace.path.display()))
                    .map_err(|error| format!("{}: {error}", namespace.path.display())),
                lost: "the bytes of its interfaces",
                required: observe.required,
            });
        }
    }
    findings.push(Finding {
        what: "open files",
        result: open_files(config),
        lost: "connections beyond it are not accepted",
        required: false,
    });
    findings.push(Finding {
        what: "ledger",
        result: Ledger::open_at(&config.gateway.ledger, &config.gateway.id)
            .map(|ledger| ledger.place().to_string())
            .map_err(|error| error.to_string()),
        lost: "the gateway does not start without it",
        required: true,
    });
    render(&findings, config.observe.is_some())
}

fn render(findings: &[Finding], observes: bool) -> (String, bool) {
    let mut text = String::new();
    let mut fit = true;
    for finding in findings {
        let (mark, words) = match &finding.result {
            Ok(found) => ("ok     ", found.clone()),
            Err(why) if finding.required => {
                fit = false;
                ("MISSING", format!("{why}; lost: {}", finding.lost))
            }
            Err(why) => ("absent ", format!("{why}; lost: {}", finding.lost)),
        };
        let _ = writeln!(text, "{mark}  {:<15} {words}", finding.what);
    }
    let verdict = match (observes, fit) {
        (false, _) => "observe is absent or disabled: the gateway serves and counts no wire bytes",
        (true, true) => "fit: every byte on the interfaces will be counted",
        (true, false) => {
            "not fit: the gateway serves degraded, or not at all with observe.required"
        }
    };
    let _ = writeln!(text, "{verdict}");
    (text, fit)
}

fn open_files(config: &Config) -> Result<String, String> {
    let limit = Limit::now().map_err(|error| error.to_string())?;
    match limit.complaint(connections_max(config)) {
        Some(complaint) => Err(complaint),
        None => Ok(format!("at most {}", limit.hard)),
    }
}

fn kernel_at_least(major: u32, minor: u32) -> Result<String, String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_err(|error| format!("unknown kernel: {error}"))?;
    at_least(release.trim(), (major, minor))
}

/// A release such as `6.1.0-13-amd64` or `6.18-rc1`.
fn at_least(release: &str, (major, minor): (u32, u32)) -> Result<String, String> {
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found >= (major, minor) {
        Ok(format!("Linux {release}"))
    } else {
        Err(format!("Linux {release} is older than {major}.{minor}"))
    }
}

fn exists(path: &str) -> Result<String, String> {
    if Path::new(path).exists() {
        Ok(path.to_owned())
    } else {
        Err(format!("no {path}; the kernel needs CONFIG_DEBUG_INFO_BTF"))
    }
}

fn capabilities() -> Result<String, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .ok_or("no CapEff in /proc/self/status")?;
    let missing: Vec<&str> = [
        (CAP_BPF, "CAP_BPF"),
        (CAP_NET_ADMIN, "CAP_NET_ADMIN"),
        (CAP_PERFMON, "CAP_PERFMON"),
    ]
    .into_iter()
    .filter(|(bit, _)| effective >> bit & 1 == 0)
    .map(|(_, name)| name)
    .collect();
    if missing.is_empty() {
        Ok("CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON".into())
    } else {
        Err(format!("without {}: run as root", missing.join(", ")))
    }
}

/// Loads the programs unattached and unpinned, and reads their empty maps by batch.
fn programs(options: &Options) -> Result<String, String> {
    let (_ebpf, maps) = kernel::load_for_test(options).map_err(|error| error.to_string())?;
    maps.read()
        .map_err(|error| format!("batch look-ups: {error}"))?;
    Ok(format!(
        "load and verify; {} flows, {} connections, {} accounts",
        options.flows_max, options.connections_max, options.accounts_max
    ))
}

/// The socket programs, attached for a moment: each works or fails alone.
fn features(options: &Options) -> Vec<Finding> {
    match kernel::try_features(options) {
        // There is no object to try: "programs" has said it.
        Err(_) => Vec::new(),
        Ok(features) => features
            .into_iter()
            .map(|feature| Finding {
                what: feature.name,
                result: feature.result,
                lost: feature.lost,
                required: false,
            })
            .collect(),
    }
}

/// Each interface that is named or matched, and what its frames look like.
fn interfaces(selection: &Selection) -> Vec<Finding> {
    let finding = |result: Result<String, String>| Finding {
        what: "interface",
        result,
        lost: "its bytes",
        required: true,
    };
    let devices = match devices() {
        Ok(devices) => devices,
        Err(error) => return vec![finding(Err(format!("cannot list interfaces: {error}")))],
    };
    let known: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    let missing = selection
        .named()
        .filter(|name| !known.contains(name))
        .map(|name| {
            finding(Err(format!(
                "{name}: No such device (known: {}); fix observe.interfaces",
                known.join(", ")
            )))
        });
    let mut findings: Vec<Finding> = missing.collect();
    for (device, inner) in selection.choose(&devices) {
        let kind = match device.framing {
            Framing::Ethernet => "Ethernet".to_owned(),
            Framing::Loopback => "loopback: sent frames are counted, each once".to_owned(),
            Framing::Bare(number) => {
                format!("link type {number}, frames begin with the IP header")
            }
        };
        let inner = if inner {
            "; stacked on another observed interface: counted, and no route is credited here"
        } else {
            ""
        };
        findings.push(finding(Ok(format!("{}: {kind}{inner}", device.name))));
    }
    if findings.is_empty() {
        findings.push(Finding {
            what: "interface",
            result: Err("none matches observe.interfaces yet".into()),
            lost: "nothing, once one appears",
            required: false,
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_compared_by_number() {
        for release in ["5.15.0", "5.15-rc1", "6.1.0-13-amd64", "10.0"] {
            assert!(at_least(release, (5, 15)).is_ok(), "{release}");
        }
        for release in ["5.9.16", "5.14.0-503.el9.x86_64", "4.19", "", "weird"] {
            let why = at_least(release, (5, 15)).unwrap_err();
            assert!(why.contains("older than 5.15"), "{release}: {why}");
        }
    }

    /// What a machine with an old kernel, no tracepoints and no rights is told.
    #[test]
    fn each_missing_feature_is_named_with_what_is_lost() {
        let lacking = |required: bool| {
            let missing = |what, why: &str, lost, required| Finding {
                what,
                result: Err(why.to_owned()),
                lost,
                required,
            };
            vec![
                Finding {
                    what: "kernel",
                    result: at_least("5.15.0", (5, 15)),
                    lost: "the programs need Linux 5.15",
                    required: true,
                },
                missing(
                    "TCX",
                    "Linux 5.15.0 is older than 6.6",
                    "links of their own",
                    false,
                ),
                missing(
                    "drops",
                    "no BTF for kfree_skb",
                    "why frames are dropped",
                    false,
                ),
                missing(
                    "capabilities",
                    "without CAP_BPF",
                    "loading the programs",
                    required,
                ),
            ]
        };
        let (text, fit) = render(&lacking(true), true);
        assert!(!fit);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "ok       kernel          Linux 5.15.0",
                "absent   TCX             Linux 5.15.0 is older than 6.6; lost: links of their own",
                "absent   drops           no BTF for kfree_skb; lost: why frames are dropped",
                "MISSING  capabilities    without CAP_BPF; lost: loading the programs",
                "not fit: the gateway serves degraded, or not at all with observe.required",
            ]
        );
        // What only adds detail does not make a machine unfit.
        let (text, fit) = render(&lacking(false), true);
        assert!(
            fit && text.ends_with("fit: every byte on the interfaces will be counted\n"),
            "{text}"
        );
    }
}
