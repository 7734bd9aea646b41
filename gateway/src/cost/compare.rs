//! A fleet of sidecar proxies against one observed gateway: a calculator. Every input is printed
//! with where it comes from, and can be replaced; nothing here is a measurement of your systems.

use std::fmt::Write as _;

use super::{book::Book, exact::divide_half_even};
use crate::money::{Nanos, Overflow, UnitPrice};

/// Hours in a month of 730 hours, as providers count.
const HOURS: i128 = 730;
const SECONDS: i128 = HOURS * 3_600;

/// A number, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input<T> {
    /// The number.
    pub value: T,
    /// Where it comes from.
    pub source: String,
}

impl<T> Input<T> {
    /// What the caller gave, or a default with its source.
    pub fn or(given: Option<T>, value: T, source: &str) -> Self {
        match given {
            Some(value) => Self {
                value,
                source: "given".into(),
            },
            None => Self {
                value,
                source: source.into(),
            },
        }
    }
}

/// Everything the result depends on.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Calls between services, a second.
    pub calls_per_second: Input<u64>,
    /// Pods with a sidecar each.
    pub pods: Input<u64>,
    /// CPU of the two sidecars a call passes, µs.
    pub sidecar_cpu_us: Input<u64>,
    /// CPU of the gateway and its observation, µs a call.
    pub gateway_cpu_us: Input<u64>,
    /// Memory of one sidecar, MiB.
    pub sidecar_memory_mib: Input<u64>,
    /// Memory of the gateway, MiB in all.
    pub gateway_memory_mib: Input<u64>,
    /// Wire bytes that the sidecars add to a call.
    pub sidecar_wire_bytes: Input<u64>,
    /// Wire bytes that the gateway adds to a call.
    pub gateway_wire_bytes: Input<u64>,
    /// Price of a core for an hour.
    pub core_hour: Input<UnitPrice>,
    /// Price of a GiB of memory for an hour.
    pub gib_hour: Input<UnitPrice>,
    /// Price of 10^9 wire bytes between the machines.
    pub gb_price: Input<UnitPrice>,
    /// Of the prices.
    pub currency: String,
}

/// A fleet's month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Month {
    /// Thousandths of a core that are busy.
    pub millicores: i128,
    /// CPU.
    pub cpu: Nanos,
    /// Memory.
    pub memory: Nanos,
    /// Wire bytes it adds.
    pub wire_bytes: i128,
    /// Their price.
    pub wire: Nanos,
    /// All of it.
    pub total: Nanos,
}

impl Inputs {
    /// One side's month, from its CPU (µs a call), memory (MiB) and wire bytes (a call).
    fn month(&self, cpu_us: u64, memory_mib: i128, bytes: u64) -> Result<Month, Overflow> {
        let calls = i128::from(self.calls_per_second.value);
        let product = |factors: &[i128]| {
            let mut product: i128 = 1;
            for factor in factors {
                product = product.checked_mul(*factor).ok_or(Overflow)?;
            }
            Ok(product)
        };
        let price = |price: UnitPrice| i128::from(price.nanos());
        let core_us = product(&[calls, i128::from(cpu_us)])?;
        // µs of CPU a second are millionths of a core.
        let cpu = product(&[core_us, HOURS, price(self.core_hour.value)])?;
        let memory = product(&[memory_mib, HOURS, price(self.gib_hour.value)])?;
        let wire_bytes = product(&[calls, i128::from(bytes), SECONDS])?;
        let wire = product(&[wire_bytes, price(self.gb_price.value)])?;
        let month = Month {
            millicores: divide_half_even(core_us, 1_000),
            cpu: Nanos(divide_half_even(cpu, 1_000_000)),
            memory: Nanos(divide_half_even(memory, 1_024)),
            wire_bytes,
            wire: Nanos(divide_half_even(wire, 1_000_000_000)),
            total: Nanos(0),
        };
        Ok(Month {
            total: month
                .cpu
                .checked_add(month.memory)?
                .checked_add(month.wire)?,
            ..month
        })
    }

    /// The sidecars' month and the gateway's.
    ///
    /// # Errors
    /// A product does not fit.
    pub fn months(&self) -> Result<(Month, Month), Overflow> {
        let pods = i128::from(self.pods.value);
        let sidecars = pods
            .checked_mul(i128::from(self.sidecar_memory_mib.value))
            .ok_or(Overflow)?;
        Ok((
            self.month(
                self.sidecar_cpu_us.value,
                sidecars,
                self.sidecar_wire_bytes.value,
            )?,
            self.month(
                self.gateway_cpu_us.value,
                i128::from(self.gateway_memory_mib.value),
                self.gateway_wire_bytes.value,
            )?,
        ))
    }

    /// Inputs, sources, result.
    ///
    /// # Errors
    /// A product does not fit.
    pub fn table(&self) -> Result<String, Overflow> {
        let (sidecars, gateway) = self.months()?;
        let mut out = String::from("inputs (replace any of them by its flag):\n");
        let currency = &self.currency;
        let mut line = |name: &str, value: String, source: &str| {
            let _ = writeln!(out, "  {name:<34} {value:>16}  {source}");
        };
        let number = |input: &Input<u64>| (input.value.to_string(), input.source.clone());
        for (name, input) in [
            ("--calls-per-second", &self.calls_per_second),
            ("--pods", &self.pods),
            ("--sidecar-cpu-us, a call", &self.sidecar_cpu_us),
            ("--gateway-cpu-us, a call", &self.gateway_cpu_us),
            ("--sidecar-memory-mib, each", &self.sidecar_memory_mib),
            ("--gateway-memory-mib, in all", &self.gateway_memory_mib),
            ("--sidecar-wire-bytes, a call", &self.sidecar_wire_bytes),
            ("--gateway-wire-bytes, a call", &self.gateway_wire_bytes),
        ] {
            let (value, source) = number(input);
            line(name, value, &source);
        }
        for (name, input) in [
            ("--core-hour", &self.core_hour),
            ("--gib-hour", &self.gib_hour),
            ("--gb-price, 10^9 wire bytes", &self.gb_price),
        ] {
            line(name, format!("{} {currency}", input.value), &input.source);
        }
        let _ = writeln!(
            out,
            "\na month of {HOURS} hours{:>22} {:>18}",
            "sidecars", "edgemeter"
        );
        for (name, left, right) in [
            (
                "busy cores",
                thousandths(sidecars.millicores),
                thousandths(gateway.millicores),
            ),
            ("CPU", sidecars.cpu.to_string(), gateway.cpu.to_string()),
            (
                "memory",
                sidecars.memory.to_string(),
                gateway.memory.to_string(),
            ),
            (
                "added wire bytes",
                sidecars.wire_bytes.to_string(),
                gateway.wire_bytes.to_string(),
            ),
            (
                "their price",
                sidecars.wire.to_string(),
                gateway.wire.to_string(),
            ),
            (
                "in all",
                sidecars.total.to_string(),
                gateway.total.to_string(),
            ),
        ] {
            let unit = match name {
                "busy cores" | "added wire bytes" => "",
                _ => currency.as_str(),
            };
            let _ = writeln!(out, "  {name:<18} {unit:<4} {left:>18} {right:>18}");
        }
        out.push_str(
            "\ncpu = calls/s x us/call / 10^6 x hours x core-hour; memory = MiB / 1024 x hours x \
             GiB-hour;\nwire = calls/s x bytes/call x seconds / 10^9 x price. A calculator: it is \
             as right as its inputs.\n",
        );
        Ok(out)
    }
}

fn thousandths(value: i128) -> String {
    format!("{}.{:03}", value / 1_000, value % 1_000)
}

/// The book's machine prices, if it has any.
#[must_use]
pub fn machine(book: &Book) -> Option<(UnitPrice, Option<UnitPrice>, String)> {
    let compute = book.compute.first()?;
    let source = if compute.source.is_empty() {
        format!("price book: {}", compute.id)
    } else {
        format!("price book: {}, {}", compute.id, compute.source)
    };
    Some((compute.core_hour, compute.gib_hour, source))
}
