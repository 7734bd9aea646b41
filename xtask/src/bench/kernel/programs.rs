//! The programs as the kernel accounts for them (`bpf_stats`), and run on their own
//! (`BPF_PROG_TEST_RUN`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{ProgramInfo, loaded_programs};
use aya::sys::{Stats, enable_stats};

use crate::netns::Namespace;

const PROG_LOAD: libc::c_int = 5;
const PROG_TEST_RUN: libc::c_int = 10;
const SCHED_CLS: u32 = 3;
/// Of `struct __sk_buff`: its size, and where the interface index is.
const CONTEXT: usize = 192;
const CONTEXT_INTERFACE: usize = 40;
/// Runs of one measurement.
const REPEAT: u32 = 1_000_000;

/// What a program ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Runs {
    pub(super) nanoseconds: u64,
    pub(super) count: u64,
}

impl Runs {
    /// Nanoseconds a run.
    pub(super) fn each(self) -> u64 {
        self.nanoseconds.checked_div(self.count).unwrap_or(0)
    }
}

/// Programs there were before ours were loaded: other people's.
pub(super) fn present() -> Result<HashSet<u32>> {
    loaded_programs()
        .map(|program| Ok(program.context("listing BPF programs")?.id()))
        .collect()
}

/// Counting of run times: every program's runs cost some nanoseconds more while this lives.
pub(super) fn count_time() -> Result<OwnedFd> {
    enable_stats(Stats::RunTime).context("switching bpf_stats on")
}

/// By program name, of the programs that are not among the others.
pub(super) fn runs(others: &HashSet<u32>) -> Result<HashMap<u32, (String, Runs)>> {
    let mut runs = HashMap::new();
    for program in ours(others)? {
        let name = program.name_as_str().unwrap_or_default().to_owned();
        let run = Runs {
            nanoseconds: u64::try_from(program.run_time().as_nanos()).unwrap_or(u64::MAX),
            count: program.run_count(),
        };
        runs.insert(program.id(), (name, run));
    }
    Ok(runs)
}

/// What ran between two readings, summed by name.
pub(super) fn between(
    before: &HashMap<u32, (String, Runs)>,
    after: &HashMap<u32, (String, Runs)>,
) -> BTreeMap<String, Runs> {
    let mut sums: BTreeMap<String, Runs> = BTreeMap::new();
    for (id, (name, run)) in after {
        let first = before.get(id).map_or(Runs::default(), |(_, run)| *run);
        let sum = sums.entry(name.clone()).or_default();
        sum.nanoseconds += run.nanoseconds.saturating_sub(first.nanoseconds);
        sum.count += run.count.saturating_sub(first.count);
    }
    sums
}

fn ours(others: &HashSet<u32>) -> Result<Vec<ProgramInfo>> {
    let programs = loaded_programs();
    let programs: Vec<ProgramInfo> = programs
        .collect::<Result<_, _>>()
        .context("listing BPF programs")?;
    let ours = programs.into_iter();
    Ok(ours
        .filter(|program| !others.contains(&program.id()))
        .collect())
}

/// Bytes of machine code by program name.
pub(super) fn sizes(others: &HashSet<u32>) -> Result<BTreeMap<String, u32>> {
    let ours = ours(others)?.into_iter();
    Ok(ours
        .map(|program| {
            let name = program.name_as_str().unwrap_or_default().to_owned();
            (name, program.size_jitted())
        })
        .collect())
}

/// What `bpf_stats` itself adds to a run: a program of two instructions, nanoseconds.
pub(super) fn floor(host: &Namespace) -> Result<u64> {
    let program = two_instructions()?;
    let _counted = count_time()?;
    host.run(|| test_run(&program, &[0; 64], 0))??;
    let info = loaded_programs()
        .filter_map(Result::ok)
        .filter(|info| info.program_type() as u32 == SCHED_CLS && info.run_count() >= REPEAT.into())
        .max_by_key(ProgramInfo::id)
        .context("the floor's program is not listed")?;
    let nanoseconds = u64::try_from(info.run_time().as_nanos()).unwrap_or(u64::MAX);
    Ok(Runs {
        nanoseconds,
        count: info.run_count(),
    }
    .each())
}

/// Nanoseconds a run of one of our programs on the same frame again and again, with everything
/// in the processor's caches, `bpf_stats` off. Counts into the real maps.
pub(super) fn hot(
    others: &HashSet<u32>,
    host: &Namespace,
    name: &str,
    frame: &[u8],
    interface: u32,
) -> Result<u64> {
    let ours = ours(others)?;
    let program = ours
        .iter()
        .find(|program| program.name_as_str() == Some(name))
        .with_context(|| format!("{name} is not loaded"))?;
    let descriptor = program.fd().context("opening the program")?;
    let descriptor = descriptor.as_fd().try_clone_to_owned()?;
    host.run(|| test_run(&descriptor, frame, interface))?
}

/// `union bpf_attr`, the arm of `BPF_PROG_LOAD` up to the flags.
#[repr(C)]
struct LoadAttr {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
    kernel_version: u32,
    flags: u32,
}

fn two_instructions() -> Result<OwnedFd> {
    // r0 = -1 (TC_ACT_UNSPEC); exit.
    let code: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];
    let mut attr = LoadAttr {
        kind: SCHED_CLS,
        instruction_count: 2,
        instructions: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 2],
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the load arm of bpf_attr; its pointers live until the call returns.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw mut attr, size_of_val(&attr)) };
    ensure!(result >= 0, "loading: {}", io::Error::last_os_error());
    // SAFETY: a descriptor the kernel has just made for us; it fits an int.
    Ok(unsafe { OwnedFd::from_raw_fd(libc::c_int::try_from(result)?) })
}

/// `union bpf_attr`, the arm of `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestAttr {
    program: u32,
    returned: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    processor: u32,
    batch_size: u32,
    padding: u32,
}

fn test_run(program: &OwnedFd, frame: &[u8], interface: u32) -> Result<u64> {
    let mut context = [0u8; CONTEXT];
    context[CONTEXT_INTERFACE..][..4].copy_from_slice(&interface.to_ne_bytes());
    let mut attr = TestAttr {
        program: program.as_raw_fd().unsigned_abs(),
        data_size_in: u32::try_from(frame.len())?,
        data_in: frame.as_ptr() as u64,
        repeat: REPEAT,
        context_size_in: u32::try_from(CONTEXT)?,
        context_in: context.as_ptr() as u64,
        ..TestAttr::default()
    };
    // SAFETY: the test arm of bpf_attr; frame and context live until the call returns, and
    // nothing is asked back but the duration.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_TEST_RUN,
            &raw mut attr,
            size_of_val(&attr),
        )
    };
    ensure!(result == 0, "running: {}", io::Error::last_os_error());
    Ok(attr.duration.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ran_between_counts() {
        let reading = |nanoseconds, count| (String::from("p"), Runs { nanoseconds, count });
        let before = HashMap::from([(1, reading(1000, 10))]);
        let after = HashMap::from([(1, reading(3000, 20)), (2, reading(500, 5))]);
        let sums = between(&before, &after);
        assert_eq!(
            sums["p"],
            Runs {
                nanoseconds: 2500,
                count: 15
            }
        );
        assert_eq!(sums["p"].each(), 166);
        assert_eq!(Runs::default().each(), 0);
    }
}
