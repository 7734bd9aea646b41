//! The TC programs, run by the kernel on crafted frames.

use aya::{
    Ebpf,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use edgemeter::{
    class::ClassId,
    kernel::{self, Maps, Options, Reading},
};
use flow_abi::{Account, AccountKey, Endpoint, Tally, cell, name, side};

use crate::packets::{Case, cases};

/// `TC_ACT_UNSPEC`: the next program, or the stack, decides.
const UNSPEC: u32 = u32::MAX;
/// The interface of a test run.
const LOOPBACK: u32 = 1;

pub fn options() -> Options {
    Options {
        bpffs: None,
        flows_max: 4096,
        connections_max: 64,
        accounts_max: 1024,
        log_level: 0,
    }
}

fn load(options: &Options) -> (Ebpf, Maps) {
    crate::require_root();
    kernel::load_for_test(options).expect("the object loads")
}

/// Runs one frame through a program; `__sk_buff` takes gso_segs at 164 and gso_size at 176.
fn run(ebpf: &Ebpf, program: &str, case: &Case) -> u32 {
    let program: &SchedClassifier = ebpf.program(program).unwrap().try_into().unwrap();
    let mut context = [0u8; 192];
    context[164..168].copy_from_slice(&case.gso_segs.to_ne_bytes());
    context[176..180].copy_from_slice(&case.gso_size.to_ne_bytes());
    let mut options = TestRunOptions::new();
    options.data_in = Some(&case.frame);
    if case.gso_size != 0 {
        options.ctx_in = Some(&context);
    }
    program
        .test_run(options)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name))
        .return_value
}

/// `[total, accounts, payload, frames, cells…]` of a direction.
fn sums(maps: &Maps, direction: usize) -> (u64, u64, u64, u64, Vec<u64>) {
    let reading: Reading = maps.read().unwrap();
    let cells = reading
        .interfaces
        .get(&LOOPBACK)
        .copied()
        .unwrap_or_default()
        .cells[direction];
    let accounts = reading.accounts.values();
    let (mut bytes, mut payload, mut frames) = (0, 0, 0);
    for account in accounts {
        bytes += [account.rx_bytes, account.tx_bytes][direction];
        payload += [account.rx_payload_bytes, account.tx_payload_bytes][direction];
        frames += [account.rx_frames, account.tx_frames][direction];
    }
    assert_eq!(reading.gap_bytes(), 0);
    let bytes_of = |number: usize| cells[number].bytes;
    (
        cells[cell::TOTAL].bytes,
        bytes,
        payload,
        frames,
        (0..cell::COUNT).map(bytes_of).collect(),
    )
}

fn flow_bytes(maps: &Maps, direction: usize) -> u64 {
    let mut sum = 0;
    maps.read_flows(|_, flow| sum += [flow.rx_bytes, flow.tx_bytes][direction])
        .unwrap();
    sum
}

#[test]
fn every_kind_of_frame_is_counted_once_in_its_place() {
    let (ebpf, maps) = load(&options());
    maps.make_cells(LOOPBACK).unwrap();
    for (direction, program) in [(0, name::INGRESS), (1, name::EGRESS)] {
        for case in cases() {
            let before = sums(&maps, direction);
            let flows_before = flow_bytes(&maps, direction);
            let verdict = run(&ebpf, program, &case);
            let after = sums(&maps, direction);
            let context = format!("{program}: {}", case.name);
            assert_eq!(
                verdict, UNSPEC,
                "{context}: an observer decided a packet's fate"
            );
            assert_eq!(after.0 - before.0, case.bytes, "{context}: wire bytes");
            let flow_delta = flow_bytes(&maps, direction) - flows_before;
            match case.cell {
                None => {
                    assert_eq!(after.1 - before.1, case.bytes, "{context}: account bytes");
                    assert_eq!(flow_delta, case.bytes, "{context}: flow bytes");
                    assert_eq!(after.2 - before.2, case.payload, "{context}: payload bytes");
                    assert_eq!(after.3 - before.3, case.frames, "{context}: frames");
                }
                Some(number) => {
                    assert_eq!(flow_delta, 0, "{context}: counted in a flow as well");
                    assert_eq!(
                        after.4[number] - before.4[number],
                        case.bytes,
                        "{context}: cell"
                    );
                    assert_eq!(
                        after.1, before.1,
                        "{context}: counted in an account as well"
                    );
                }
            }
        }
    }
}

#[test]
fn a_full_flow_table_is_counted_not_hidden() {
    let (ebpf, maps) = load(&Options {
        // And the row of flows that are over.
        flows_max: 9,
        ..options()
    });
    maps.make_cells(LOOPBACK).unwrap();
    let template = cases()
        .into_iter()
        .find(|case| case.name == "tcp4")
        .unwrap();
    for port in 0..64u16 {
        let mut frame = template.frame.clone();
        frame[36..38].copy_from_slice(&(1000 + port).to_be_bytes());
        let case = Case {
            name: "one of many",
            frame,
            ..cases().remove(0)
        };
        run(&ebpf, name::INGRESS, &case);
    }
    let (total, accounts, _, _, cells) = sums(&maps, 0);
    let frame_len = template.frame.len() as u64;
    assert_eq!(total, 64 * frame_len);
    assert!(
        cells[cell::FLOWS_FULL] > 0,
        "eight entries held sixty-four flows"
    );
    assert_eq!(accounts + cells[cell::FLOWS_FULL], total);
    assert_eq!(flow_bytes(&maps, 0) + cells[cell::FLOWS_FULL], total);
}

#[test]
fn an_interface_without_cells_counts_as_orphan() {
    let (ebpf, maps) = load(&options());
    let case = cases().remove(0);
    run(&ebpf, name::INGRESS, &case);
    run(&ebpf, name::EGRESS, &case);
    run(&ebpf, name::EGRESS, &case);
    let orphans = maps.read().unwrap().orphans;
    assert_eq!(
        [orphans[0].bytes, orphans[1].bytes],
        [case.bytes, 2 * case.bytes]
    );
    assert_eq!([orphans[0].frames, orphans[1].frames], [1, 2]);
}

#[test]
fn a_full_account_table_is_counted_and_logged() {
    let (mut ebpf, maps) = load(&Options {
        accounts_max: 1,
        log_level: 4,
        ..options()
    });
    let lines = Lines::default();
    let mut log = aya_log::EbpfLogger::init_with_logger(&mut ebpf, lines.clone()).unwrap();
    maps.make_cells(LOOPBACK).unwrap();
    // Another owner at port 8080: its account does not fit beside the first.
    let endpoint = Endpoint {
        overhead_owner: 7,
        unclaimed_owner: 8,
    };
    maps.set_endpoints(&[("0.0.0.0:8080".parse().unwrap(), side::LISTENER, endpoint)])
        .unwrap();
    let theirs = cases()
        .into_iter()
        .find(|case| case.name == "udp6")
        .unwrap();
    let ours = cases()
        .into_iter()
        .find(|case| case.name == "tcp4")
        .unwrap();
    run(&ebpf, name::INGRESS, &theirs);
    run(&ebpf, name::EGRESS, &ours);
    log.flush();
    let (total, accounts, _, _, cells) = sums(&maps, 1);
    assert_eq!((total, accounts), (ours.bytes, 0));
    assert_eq!(cells[cell::ACCOUNTS_FULL], ours.bytes);
    assert_eq!(
        flow_bytes(&maps, 1),
        ours.bytes,
        "the flow has it all the same"
    );
    let said = lines.0.lock().unwrap().join("\n");
    assert!(
        said.contains("account table full"),
        "the programs log through aya-log: {said:?}"
    );
}

#[test]
fn a_flow_at_an_endpoint_is_the_gateways() {
    let (ebpf, maps) = load(&options());
    maps.make_cells(LOOPBACK).unwrap();
    let listener = Endpoint {
        overhead_owner: 7,
        unclaimed_owner: 8,
    };
    let peer = Endpoint {
        overhead_owner: 17,
        unclaimed_owner: 18,
    };
    maps.set_endpoints(&[
        ("[::]:8080".parse().unwrap(), side::LISTENER, listener),
        ("10.0.0.1:8080".parse().unwrap(), side::PEER, peer),
    ])
    .unwrap();
    let case = |name: &str| cases().into_iter().find(|case| case.name == name).unwrap();
    // The frames go from port 8080: sent, that is our listener; received, our upstream's peer.
    let (data, bare) = (case("tcp4"), case("tcp4 without payload"));
    run(&ebpf, name::EGRESS, &data);
    run(&ebpf, name::INGRESS, &data);
    run(&ebpf, name::INGRESS, &bare);
    let account = |owner| account_of(&maps, owner);
    assert_eq!(
        account(7).tx_bytes,
        data.bytes,
        "sent, and no request owns it"
    );
    assert_eq!(
        account(18).rx_bytes,
        data.bytes,
        "received payload waits for its request"
    );
    assert_eq!(
        account(17).rx_bytes,
        bare.bytes,
        "an acknowledgement is overhead"
    );
}

fn account_of(maps: &Maps, owner: u32) -> Account {
    maps.read().unwrap().accounts[&AccountKey {
        owner,
        ifindex: LOOPBACK,
        class: 0,
    }]
}

#[test]
fn owners_whose_tallies_fall_on_one_place_are_both_counted() {
    let (ebpf, maps) = load(&options());
    maps.make_cells(LOOPBACK).unwrap();
    let place = |owner| Tally::place(owner, LOOPBACK, 0);
    let (first, second) = (7, 7 + Tally::COUNT);
    assert_eq!(place(first), place(second));
    let owners = |overhead_owner| Endpoint {
        overhead_owner,
        unclaimed_owner: 9,
    };
    maps.set_endpoints(&[
        ("[::]:8080".parse().unwrap(), side::LISTENER, owners(first)),
        ("10.0.0.1:8080".parse().unwrap(), side::PEER, owners(second)),
    ])
    .unwrap();
    let case = cases()
        .into_iter()
        .find(|case| case.name == "tcp4 without payload")
        .unwrap();
    // The first frame of either makes its account, the first's ones after it are in the tally.
    for _ in 0..3 {
        run(&ebpf, name::EGRESS, &case);
        run(&ebpf, name::INGRESS, &case);
    }
    let account = |owner| account_of(&maps, owner);
    let sent = account(first);
    assert_eq!((sent.tx_bytes, sent.tx_frames), (3 * case.bytes, 3));
    let received = account(second);
    assert_eq!((received.rx_bytes, received.rx_frames), (3 * case.bytes, 3));
    for direction in 0..2 {
        let (total, sum, ..) = sums(&maps, direction);
        assert_eq!((total, sum), (3 * case.bytes, 3 * case.bytes));
    }
}

#[test]
fn the_longest_prefix_of_the_remote_address_is_the_class() {
    let (ebpf, maps) = load(&options());
    maps.make_cells(LOOPBACK).unwrap();
    let set = |classes: &[(&str, u32)]| {
        let classes: Vec<_> = classes
            .iter()
            .map(|(cidr, class)| (cidr.parse().unwrap(), ClassId(*class)))
            .collect();
        maps.set_classes(&classes).unwrap();
    };
    let case = |name: &str| cases().into_iter().find(|case| case.name == name).unwrap();
    // From 10.0.0.1 to 10.0.0.2: received, 10.0.0.1 is remote; sent, 10.0.0.2 is.
    let (v4, v6) = (case("tcp4"), case("udp6"));
    let by_class = || {
        let mut sums = std::collections::BTreeMap::new();
        for (key, account) in maps.read().unwrap().accounts {
            *sums.entry(key.class).or_insert(0) += account.rx_bytes + account.tx_bytes;
        }
        sums.retain(|_, bytes| *bytes != 0);
        sums
    };
    set(&[("::/0", 3), ("10.0.0.0/8", 4), ("10.0.0.2/32", 5)]);
    run(&ebpf, name::INGRESS, &v4);
    run(&ebpf, name::EGRESS, &v4);
    run(&ebpf, name::EGRESS, &v4);
    run(&ebpf, name::INGRESS, &v6);
    assert_eq!(
        by_class(),
        [(3, v6.bytes), (4, v4.bytes), (5, 2 * v4.bytes)].into()
    );
    // A flow that is nobody's asks again when the table has changed; what was counted stays.
    set(&[("::/0", 3)]);
    run(&ebpf, name::INGRESS, &v4);
    run(&ebpf, name::EGRESS, &v4);
    assert_eq!(
        by_class(),
        [
            (0, 2 * v4.bytes),
            (3, v6.bytes),
            (4, v4.bytes),
            (5, 2 * v4.bytes)
        ]
        .into(),
        "an IPv6 prefix holds no IPv4 address"
    );
    assert_eq!(maps.highest_numbers().unwrap(), (0, 5));
    let (total, accounts, ..) = sums(&maps, 0);
    assert_eq!(total, accounts);
}

#[test]
fn a_gateway_connection_keeps_the_class_it_began_with() {
    let (ebpf, maps) = load(&options());
    maps.make_cells(LOOPBACK).unwrap();
    let endpoint = Endpoint {
        overhead_owner: 7,
        unclaimed_owner: 8,
    };
    maps.set_endpoints(&[("0.0.0.0:8080".parse().unwrap(), side::LISTENER, endpoint)])
        .unwrap();
    let case = cases()
        .into_iter()
        .find(|case| case.name == "tcp4")
        .unwrap();
    for class in [4, 5] {
        maps.set_classes(&[("10.0.0.0/8".parse().unwrap(), ClassId(class))])
            .unwrap();
        run(&ebpf, name::EGRESS, &case);
    }
    let classes: Vec<u32> = maps
        .read()
        .unwrap()
        .accounts
        .keys()
        .map(|key| key.class)
        .collect();
    assert_eq!(classes, [4]);
}

#[derive(Clone, Default)]
struct Lines(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }
    fn flush(&self) {}
}
