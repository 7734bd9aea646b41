//! What changes campaigns and experiments: revisions, exposures, outcomes, verdicts.

use crate::campaign::Campaign;
use crate::experiment::revision::{Digest, History, Number, Rejected, Standing};
use crate::experiment::statistics::Sample;
use crate::experiment::{Experiment, Metric};
use crate::store::sql::{Connection, Param, SqlError};
use crate::store::{Command, Locks, StoreError, Tx};

fn text(value: &str) -> Param<'_> {
    Param::Text(value.into())
}

fn number(value: Number) -> Param<'static> {
    Param::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}

/// Every revision and which one is active.
///
/// # Errors
/// [`SqlError`]
pub fn history(connection: &mut dyn Connection) -> Result<History, SqlError> {
    let rows = connection.query(
        "SELECT number, digest, standing FROM campaign_revision",
        &[],
    )?;
    let stored = rows
        .into_iter()
        .map(|mut row| {
            let number: i64 = row.take()?;
            let digest: Vec<u8> = row.take()?;
            let standing: String = row.take()?;
            Ok((
                Number::try_from(number).map_err(|_| SqlError::Column("a revision"))?,
                Digest::try_from(digest).map_err(|_| SqlError::Column("a digest"))?,
                Standing::parse(&standing).ok_or(SqlError::Column("a standing"))?,
            ))
        })
        .collect::<Result<Vec<_>, SqlError>>()?;
    let active = connection
        .query("SELECT number FROM campaign_active", &[])?
        .pop()
        .map_or(Ok(0), |mut row| row.take::<i64>())?;
    Ok(History::restore(
        stored,
        Number::try_from(active).unwrap_or(0),
    ))
}

/// The active revision's number and text; the empty text for revision 0.
///
/// # Errors
/// [`SqlError`]
pub fn active(connection: &mut dyn Connection) -> Result<(Number, String), SqlError> {
    let row = connection
        .query(
            "SELECT number, body FROM campaign_revision
             WHERE number = (SELECT number FROM campaign_active)",
            &[],
        )?
        .pop();
    row.map_or(Ok((0, String::new())), |mut row| {
        let number: i64 = row.take()?;
        Ok((Number::try_from(number).unwrap_or(0), row.take()?))
    })
}

fn point_at(tx: &mut Tx<'_>, active: Number) -> Result<(), StoreError> {
    tx.write(
        "INSERT INTO campaign_active (id, number) VALUES (1, ?1)
         ON CONFLICT (id) DO UPDATE SET number = excluded.number",
        &[number(active)],
    )?;
    Ok(())
}

/// Makes a checked campaign text the active revision.
pub struct Publish {
    /// The text.
    pub body: String,
}

impl Command for Publish {
    type Output = Result<Number, Rejected>;

    fn locks(&self, locks: &mut Locks) {
        locks.name("campaign", "active");
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Self::Output, StoreError> {
        let mut history = history(tx.connection())?;
        let digest = Campaign::digest(&self.body);
        let published = match history.publish(digest) {
            Ok(published) => published,
            Err(rejected) => return Ok(Err(rejected)),
        };
        tx.write(
            "INSERT INTO campaign_revision (number, digest, body, standing, reason, at_ms)
             VALUES (?1, ?2, ?3, ?4, '', ?5)",
            &[
                number(published),
                Param::Blob((&digest[..]).into()),
                text(&self.body),
                text(Standing::Candidate.as_str()),
                Param::Integer(tx.now_ms),
            ],
        )?;
        point_at(tx, published)?;
        Ok(Ok(published))
    }
}

/// Changes the standing of the active revision, if it still is the active one.
pub struct Judge {
    /// Which revision was judged.
    pub revision: Number,
    /// Its new standing: good, or rolled back.
    pub standing: Standing,
    /// Why.
    pub reason: String,
}

impl Command for Judge {
    /// The revision that is active afterwards.
    type Output = Number;

    fn locks(&self, locks: &mut Locks) {
        locks.name("campaign", "active");
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Number, StoreError> {
        let mut history = history(tx.connection())?;
        let known = history.standing(self.revision);
        if history.active() != self.revision
            || known != Some(Standing::Candidate) && self.standing == Standing::Good
        {
            return Ok(history.active());
        }
        match self.standing {
            Standing::Good => history.approve(),
            Standing::RolledBack => {
                history.roll_back();
            }
            Standing::Candidate => return Ok(history.active()),
        }
        tx.write(
            "UPDATE campaign_revision SET standing = ?2, reason = ?3 WHERE number = ?1",
            &[
                number(self.revision),
                text(self.standing.as_str()),
                text(&self.reason),
            ],
        )?;
        point_at(tx, history.active())?;
        Ok(history.active())
    }
}

/// Something an experiment counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// A customer saw a variant.
    Exposure {
        /// The experiment.
        name: String,
        /// Its salt.
        salt: String,
        /// The customer.
        unit: String,
        /// What they saw.
        variant: String,
    },
    /// A customer ordered.
    Outcome {
        /// The order.
        order_id: String,
        /// The customer.
        unit: String,
        /// What it came to.
        total_minor: i64,
    },
}

/// Stores observations; each counts once however often it is stored.
pub struct Observe(pub Vec<Observation>);

impl Command for Observe {
    type Output = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        for observation in &self.0 {
            let now = Param::Integer(tx.now_ms);
            match observation {
                Observation::Exposure {
                    name,
                    salt,
                    unit,
                    variant,
                } => tx.write(
                    "INSERT INTO exposure (name, salt, unit, variant, at_ms)
                     VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
                    &[text(name), text(salt), text(unit), text(variant), now],
                )?,
                Observation::Outcome {
                    order_id,
                    unit,
                    total_minor,
                } => tx.write(
                    "INSERT INTO outcome (order_id, unit, total_minor, at_ms)
                     VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
                    &[
                        text(order_id),
                        text(unit),
                        Param::Integer(*total_minor),
                        now,
                    ],
                )?,
            }
        }
        Ok(())
    }
}

/// A run of an experiment as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// When it began.
    pub started_at_ms: i64,
    /// Its verdict, `running` until there is one.
    pub verdict: String,
    /// The variant everybody gets since then.
    pub variant: Option<String>,
}

/// Begins the runs that have not begun.
pub struct Begin(pub Vec<(String, String)>);

impl Command for Begin {
    type Output = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        for (name, salt) in &self.0 {
            let now = Param::Integer(tx.now_ms);
            tx.write(
                "INSERT INTO experiment_run (name, salt, started_at_ms, verdict)
                 VALUES (?1, ?2, ?3, 'running') ON CONFLICT DO NOTHING",
                &[text(name), text(salt), now],
            )?;
        }
        Ok(())
    }
}

/// Ends a run. The first decision stays.
pub struct Decide {
    /// The experiment.
    pub name: String,
    /// Its salt.
    pub salt: String,
    /// The verdict's name.
    pub verdict: &'static str,
    /// What everybody gets from now on.
    pub variant: String,
}

impl Command for Decide {
    type Output = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        tx.write(
            "UPDATE experiment_run SET verdict = ?3, variant = ?4, decided_at_ms = ?5
             WHERE name = ?1 AND salt = ?2 AND decided_at_ms IS NULL",
            &[
                text(&self.name),
                text(&self.salt),
                text(self.verdict),
                text(&self.variant),
                Param::Integer(tx.now_ms),
            ],
        )?;
        Ok(())
    }
}

/// The run of an experiment under its present salt.
///
/// # Errors
/// [`SqlError`]
pub fn run(
    connection: &mut dyn Connection,
    experiment: &Experiment,
) -> Result<Option<Run>, SqlError> {
    let row = connection
        .query(
            "SELECT started_at_ms, verdict, variant FROM experiment_run
             WHERE name = ?1 AND salt = ?2",
            &[text(&experiment.name), text(&experiment.salt)],
        )?
        .pop();
    row.map(|mut row| {
        Ok(Run {
            started_at_ms: row.take()?,
            verdict: row.take()?,
            variant: row.take()?,
        })
    })
    .transpose()
}

/// What was counted, in the order of the variants. Orders count from the exposure on.
///
/// # Errors
/// [`SqlError`]
pub fn samples(
    connection: &mut dyn Connection,
    experiment: &Experiment,
) -> Result<Vec<Sample>, SqlError> {
    // Equal amounts are counted together, so that squares are summed here in 128 bits
    // instead of in the database in 64.
    let rows = connection.query(
        "SELECT variant, spent, count(*) FROM (
             SELECT e.unit, e.variant AS variant,
                    CAST(coalesce(sum(o.total_minor), 0) AS BIGINT) AS spent
             FROM exposure AS e
             LEFT JOIN outcome AS o ON o.unit = e.unit AND o.at_ms >= e.at_ms
             WHERE e.name = ?1 AND e.salt = ?2
             GROUP BY e.unit, e.variant) AS spending
         GROUP BY variant, spent",
        &[text(&experiment.name), text(&experiment.salt)],
    )?;
    let mut samples = vec![Sample::default(); experiment.variants.len()];
    for mut row in rows {
        let variant: String = row.take()?;
        let spent: i64 = row.take()?;
        let units: i64 = row.take()?;
        let known = experiment
            .variants
            .iter()
            .position(|known| known.name == variant)
            .and_then(|at| samples.get_mut(at));
        // A variant that was taken out of the configuration is no longer compared.
        let (Some(sample), Ok(units), Ok(spent)) =
            (known, u64::try_from(units), u64::try_from(spent))
        else {
            continue;
        };
        let outcome = match experiment.metric {
            Metric::Conversion => u64::from(spent > 0),
            Metric::Revenue => spent,
        };
        sample.units = sample.units.saturating_add(units);
        sample.sum = sample.sum.saturating_add(outcome.saturating_mul(units));
        let squares = u128::from(outcome) * u128::from(outcome) * u128::from(units);
        sample.sum_of_squares = sample.sum_of_squares.saturating_add(squares);
    }
    Ok(samples)
}
