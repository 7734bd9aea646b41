//! What a process used, from the kernel's own accounting.

use std::path::Path;

use anyhow::{Context as _, Result};

/// CPU time of a process, its children and their threads, nanoseconds.
///
/// The scheduler's count (`/proc/…/task/*/schedstat`): nanoseconds, system time included, and
/// the network softirqs that run in the process's context. Threads that have ended are not in it.
pub(super) fn cpu_ns(pid: u32) -> Result<u64> {
    family(pid).iter().try_fold(0, |sum, pid| {
        let tasks = Path::new("/proc").join(pid.to_string()).join("task");
        let mut of_process = 0;
        for task in std::fs::read_dir(&tasks).with_context(|| format!("process {pid} is gone"))? {
            let path = task?.path().join("schedstat");
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            of_process += text
                .split(' ')
                .next()
                .and_then(|first| first.parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(sum + of_process)
    })
}

/// Resident memory of a process and its children, KiB.
pub(super) fn resident_kib(pid: u32) -> u64 {
    family(pid)
        .iter()
        .filter_map(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .sum()
}

/// Time all processors were not idle, nanoseconds: what no process is charged for is in it.
pub(super) fn machine_ns() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let fields: Vec<u64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user, nice, system, (idle, iowait), irq, softirq; in hundredths of a second.
    let busy: u64 = [0, 1, 2, 5, 6]
        .iter()
        .filter_map(|&at| fields.get(at))
        .sum();
    Ok(busy * 10_000_000)
}

/// CPU time of this process, threads that have ended included, and of the kernel's softirq
/// threads, nanoseconds. Finer than [`machine_ns`], which counts ticks.
pub(super) fn own_ns() -> u64 {
    // SAFETY: a zeroed rusage is valid, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let nanoseconds = |time: libc::timeval| {
        (time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_usec.unsigned_abs()) * 1000
    };
    let softirq: u64 = softirq_threads()
        .iter()
        .filter_map(|pid| cpu_ns(*pid).ok())
        .sum();
    nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime) + softirq
}

fn softirq_threads() -> Vec<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            name.starts_with("ksoftirqd/").then_some(pid)
        })
        .collect()
}

/// CPU time of a process's threads of one name, nanoseconds.
pub(super) fn thread_ns(pid: u32, name: &str) -> Result<u64> {
    let tasks = Path::new("/proc").join(pid.to_string()).join("task");
    let mut sum = 0;
    for task in std::fs::read_dir(&tasks).with_context(|| format!("process {pid} is gone"))? {
        let task = task?.path();
        let read = |file: &str| std::fs::read_to_string(task.join(file)).unwrap_or_default();
        if read("comm").trim_end() == name {
            let used = read("schedstat");
            let used = used.split(' ').next().unwrap_or_default().parse::<u64>();
            sum += used.unwrap_or(0);
        }
    }
    Ok(sum)
}

/// The process and all its descendants.
fn family(root: u32) -> Vec<u32> {
    let mut members = vec![root];
    let mut next = 0;
    while let Some(&parent) = members.get(next) {
        let children = format!("/proc/{parent}/task/{parent}/children");
        if let Ok(text) = std::fs::read_to_string(children) {
            members.extend(
                text.split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
        next += 1;
    }
    members
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_time_and_memory() {
        let pid = std::process::id();
        let before = cpu_ns(pid).unwrap();
        let mut sum = 0_u64;
        for n in 0..20_000_000_u64 {
            sum = sum.wrapping_mul(31).wrapping_add(std::hint::black_box(n));
        }
        std::hint::black_box(sum);
        assert!(cpu_ns(pid).unwrap() > before);
        assert!(resident_kib(pid) > 100);
        assert!(machine_ns().unwrap() > 0);
        assert!(own_ns() > 0);
        assert_eq!(thread_ns(pid, "no such thread").unwrap(), 0);
    }
}
