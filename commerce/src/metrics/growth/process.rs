//! The tasks and the process as they are: from the census, and by the kernel's own account.

use std::time::Duration;

use super::{KindLabel, count, gauge};
use crate::census::{Census, Kind};
use crate::metrics::Metrics;

impl Metrics {
    /// The tasks and the process as they are.
    pub fn process(&self, census: &Census) {
        for kind in Kind::ALL {
            let (tasks, oldest) = census.count(kind);
            let labels = KindLabel {
                kind: kind.as_str(),
            };
            gauge(count(tasks), &self.growth.tasks.get_or_create(&labels));
            gauge(count(oldest), &self.growth.oldest.get_or_create(&labels));
        }
        let Some((cpu, resident)) = usage() else {
            return;
        };
        // A counter only rises; the kernel's clock does too.
        let risen = cpu.saturating_sub(Duration::from_secs_f64(self.growth.cpu.get().max(0.0)));
        self.growth.cpu.inc_by(risen.as_secs_f64());
        gauge(count(resident), &self.growth.resident);
    }
}

/// Processor time and resident bytes of this process, by the kernel's own account.
fn usage() -> Option<(Duration, u64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name is in parentheses and may contain anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |at: usize| fields.get(at)?.parse::<u64>().ok();
    // proc_pid_stat(5): utime and stime are fields 14 and 15, in ticks of 10 ms; rss is
    // field 24, in pages. The first field here is the third there.
    let ticks = field(11)?.saturating_add(field(12)?);
    let resident = field(21)?.saturating_mul(4096);
    Some((Duration::from_millis(ticks.saturating_mul(10)), resident))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_knows_its_own_use() {
        let (_, resident) = usage().unwrap();
        assert!(resident > 1024 * 1024, "{resident}");
    }
}
