//! What each owner moved in a period, from whatever grain is left of it.

use flow_abi::Direction;

use super::{
    Grain, Ledger, LedgerError,
    sql::{SqlError, Statements, values},
    store::{amount, direction, owner},
};
use crate::{
    attribution::Amount,
    cost::calendar::Period,
    owner::{Owner, OwnerId},
};

/// One line of a period's use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Which gateway's.
    pub gateway: String,
    /// Interface.
    pub interface: String,
    /// Direction.
    pub direction: Direction,
    /// Owner's number at the gateway.
    pub owner_id: OwnerId,
    /// Whose bytes; foreign for a number without a meaning.
    pub owner: Owner,
    /// Peer class number.
    pub class: u32,
    /// The coarsest grain in it. A row that is coarser than the period's bounds is counted in
    /// the period its start lies in, whole, so that neighbouring periods never count it twice.
    pub grain: Grain,
    /// How much.
    pub amount: Amount,
}

impl Ledger {
    /// What a period used: this gateway's, or every gateway's that shares the ledger.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn sums(&self, period: Period, all_gateways: bool) -> Result<Vec<Sum>, LedgerError> {
        let gateway = (!all_gateways).then_some(self.gateway_id());
        self.read(|statements| sums(statements, period, gateway))
    }

    /// The span the ledger has rows of this gateway for; None when it is empty.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn span(&self) -> Result<Option<Period>, LedgerError> {
        let gateway = self.gateway_id();
        self.read(|statements| {
            let mut span: Option<Period> = None;
            let rows = statements.query(
                "SELECT grain, MIN(start), MAX(start) FROM cell_posting WHERE gateway = ?1
                 GROUP BY grain
                 UNION ALL
                 SELECT grain, MIN(start), MAX(start) FROM posting WHERE gateway = ?1
                 GROUP BY grain",
                values![gateway],
            )?;
            for row in rows {
                let last = Grain::from_number(row.int(0)?).span(row.int(2)?);
                let start = row.int(1)?;
                span = Some(span.map_or(Period { start, ..last }, |span| Period {
                    start: span.start.min(start),
                    end: span.end.max(last.end),
                }));
            }
            Ok(span)
        })
    }
}

fn sums(
    statements: &mut dyn Statements,
    period: Period,
    gateway: Option<i64>,
) -> Result<Vec<Sum>, SqlError> {
    let rows = statements.query(
        "SELECT g.name, p.interface, p.direction, p.owner, p.class, MAX(p.grain),
                CAST(SUM(p.wire_bytes) AS BIGINT), CAST(SUM(p.frames) AS BIGINT),
                CAST(SUM(p.l4_payload_bytes) AS BIGINT), CAST(SUM(p.retransmit_bytes) AS BIGINT),
                CAST(SUM(p.retransmit_frames) AS BIGINT),
                CAST(SUM(p.retransmit_payload_bytes) AS BIGINT),
                MAX(w.kind), MAX(w.leg), MAX(w.endpoint), MAX(w.route), MAX(w.service),
                MAX(w.tenant), MAX(w.quality)
         FROM posting p JOIN gateway g ON g.id = p.gateway
              LEFT JOIN owner w ON w.gateway = p.gateway AND w.id = p.owner
         WHERE p.gateway IN (SELECT id FROM gateway WHERE ?3 = 0 OR id = ?3)
           AND p.grain IN (-1, 0, 1, 2, 3) AND p.start >= ?1 AND p.start < ?2
         GROUP BY g.name, p.gateway, p.interface, p.direction, p.owner, p.class
         ORDER BY g.name, p.interface, p.direction, p.owner, p.class",
        values![period.start, period.end, gateway.unwrap_or(0)],
    )?;
    rows.iter()
        .map(|row| {
            let unknown = row.text(12).is_err();
            Ok(Sum {
                gateway: row.text(0)?.to_owned(),
                interface: row.text(1)?.to_owned(),
                direction: direction(row.int(2)?),
                owner_id: OwnerId(row.small(3)?),
                class: row.small(4)?,
                grain: Grain::from_number(row.int(5)?),
                amount: amount(row, 6)?,
                owner: if unknown {
                    Owner::foreign()
                } else {
                    owner(row, 12)?
                },
            })
        })
        .collect()
}
