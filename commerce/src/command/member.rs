//! What changes members: registration, logins, refresh tokens, renewals, signing keys.

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::catalogue::Sku;
use crate::command;
use crate::membership::token::{Key, Ring};
use crate::membership::{REFRESH_MS, Refresh, RefreshToken, Renewal, Standing, Subscription};
use crate::metrics::Metrics;
use crate::order::{Line, OrderId, Status};
use crate::store::sql::{Connection, Param, SqlError};
use crate::store::{Command, Locks, StoreError, Tx};

/// A member as stored.
#[derive(Clone, Debug)]
pub struct Member {
    /// Identity; the `sub` of tokens.
    pub id: String,
    /// PHC string of the password.
    pub password_hash: String,
    /// What was paid.
    pub subscription: Subscription,
}

fn text(value: &str) -> Param<'_> {
    Param::Text(value.into())
}

fn blob(value: &[u8]) -> Param<'_> {
    Param::Blob(value.into())
}

const MEMBER_COLUMNS: &str = "SELECT id, password_hash, period, paid_until_ms FROM member";

fn find(
    connection: &mut dyn Connection,
    column: &str,
    value: &str,
) -> Result<Option<Member>, SqlError> {
    let sql = format!("{MEMBER_COLUMNS} WHERE {column} = ?1");
    let row = connection.query(&sql, &[text(value)])?.pop();
    row.map(|mut row| {
        Ok(Member {
            id: row.take()?,
            password_hash: row.take()?,
            subscription: Subscription {
                period: row.take()?,
                paid_until_ms: row.take()?,
            },
        })
    })
    .transpose()
}

/// The member with this address.
///
/// # Errors
/// [`SqlError`]
pub fn by_email(connection: &mut dyn Connection, email: &str) -> Result<Option<Member>, SqlError> {
    find(connection, "email", email)
}

/// The member with this identity.
///
/// # Errors
/// [`SqlError`]
pub fn by_id(connection: &mut dyn Connection, id: &str) -> Result<Option<Member>, SqlError> {
    find(connection, "id", id)
}

/// Whether a member's benefits apply; nobody's do for an unknown one.
///
/// # Errors
/// [`SqlError`]
pub fn standing(
    connection: &mut dyn Connection,
    id: &str,
    now_ms: i64,
) -> Result<Standing, SqlError> {
    let member = by_id(connection, id)?;
    Ok(member.map_or(Standing::Lapsed, |member| {
        member.subscription.standing(now_ms)
    }))
}

/// Registers a member; `false` when the address has one.
pub struct Register {
    /// Identity to give.
    pub id: Uuid,
    /// Address, in lower case.
    pub email: String,
    /// PHC string of the password.
    pub password_hash: String,
}

impl Command for Register {
    type Output = bool;

    fn locks(&self, locks: &mut Locks) {
        locks.name("member", &self.email);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<bool, StoreError> {
        if by_email(tx.connection(), &self.email)?.is_some() {
            return Ok(false);
        }
        tx.write(
            "INSERT INTO member (id, email, password_hash, period, paid_until_ms, created_at_ms)
             VALUES (?1, ?2, ?3, 0, 0, ?4)",
            &[
                Param::Uuid(self.id),
                text(&self.email),
                text(&self.password_hash),
                Param::Integer(tx.now_ms),
            ],
        )?;
        Ok(true)
    }
}

/// The hash under which a refresh token is stored.
fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// Begins a family of refresh tokens: somebody has logged in.
pub struct Login {
    /// Who.
    pub member_id: String,
    /// The family's identity.
    pub family: Uuid,
    /// The first token.
    pub secret: String,
}

impl Command for Login {
    type Output = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        tx.write(
            "INSERT INTO refresh_family (id, member_id, created_at_ms) VALUES (?1, ?2, ?3)",
            &[
                Param::Uuid(self.family),
                text(&self.member_id),
                Param::Integer(tx.now_ms),
            ],
        )?;
        add_token(tx, &self.family.to_string(), &self.secret)
    }
}

fn add_token(tx: &mut Tx<'_>, family: &str, secret: &str) -> Result<(), StoreError> {
    let expires = tx.now_ms.saturating_add(REFRESH_MS);
    tx.write(
        "INSERT INTO refresh_token (hash, family_id, expires_at_ms) VALUES (?1, ?2, ?3)",
        &[blob(&hash(secret)), text(family), Param::Integer(expires)],
    )?;
    Ok(())
}

/// Exchanges a refresh token for the next one. A token presented twice ends its family.
pub struct Exchange {
    /// What was presented.
    pub presented: String,
    /// What to give for it.
    pub next: String,
}

impl Command for Exchange {
    /// The member, when the exchange succeeded.
    type Output = (Refresh, Option<String>);

    fn locks(&self, locks: &mut Locks) {
        locks.name("refresh", &self.presented);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Self::Output, StoreError> {
        let hash = hash(&self.presented);
        let found = tx.query(
            "SELECT family_id, member_id, used_at_ms, revoked_at_ms, expires_at_ms
             FROM refresh_token JOIN refresh_family ON refresh_family.id = family_id
             WHERE hash = ?1",
            &[blob(&hash)],
        )?;
        let Some(mut row) = found.into_iter().next() else {
            return Ok((Refresh::Invalid, None));
        };
        let (family, member): (String, String) = (row.take()?, row.take()?);
        let (used, revoked): (Option<i64>, Option<i64>) = (row.take()?, row.take()?);
        let token = RefreshToken {
            used: used.is_some(),
            revoked: revoked.is_some(),
            expires_at_ms: row.take()?,
        };
        let outcome = token.present(tx.now_ms);
        let now = Param::Integer(tx.now_ms);
        match outcome {
            Refresh::Rotate => {
                tx.write(
                    "UPDATE refresh_token SET used_at_ms = ?2 WHERE hash = ?1",
                    &[blob(&hash), now],
                )?;
                add_token(tx, &family, &self.next)?;
                Ok((outcome, Some(member)))
            }
            Refresh::Reused => {
                tx.write(
                    "UPDATE refresh_family SET revoked_at_ms = ?2 WHERE id = ?1",
                    &[text(&family), now],
                )?;
                Ok((outcome, None))
            }
            Refresh::Invalid => Ok((outcome, None)),
        }
    }

    fn committed(&self, (outcome, _): &Self::Output, metrics: &Metrics) {
        metrics.refresh_presented(*outcome);
    }
}

/// Ends the family of a refresh token: somebody has logged out.
pub struct Revoke {
    /// The token.
    pub presented: String,
}

impl Command for Revoke {
    type Output = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        tx.write(
            "UPDATE refresh_family SET revoked_at_ms = ?2
             WHERE revoked_at_ms IS NULL
               AND id = (SELECT family_id FROM refresh_token WHERE hash = ?1)",
            &[blob(&hash(&self.presented)), Param::Integer(tx.now_ms)],
        )?;
        Ok(())
    }
}

/// Turns a paid order into a period of a subscription. Asking again for a period that was
/// bought changes nothing.
pub struct Renew {
    /// Whose.
    pub member_id: String,
    /// Which period.
    pub period: i64,
    /// Whose order it must be.
    pub principal: String,
    /// The order that was paid for it.
    pub order: OrderId,
    /// The product that is a period of membership.
    pub sku: Sku,
}

/// What became of a renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// There is no such member.
    NoMember,
    /// The order buys nothing, for this reason.
    Unpaid(&'static str),
    /// The renewal, and the subscription after it.
    Done(Renewal, Subscription),
}

impl Command for Renew {
    type Output = Renewed;

    fn locks(&self, locks: &mut Locks) {
        locks.name("subscription", &self.member_id);
        locks.order(&self.order);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Self::Output, StoreError> {
        let Some(member) = by_id(tx.connection(), &self.member_id)? else {
            return Ok(Renewed::NoMember);
        };
        let renewal = member.subscription.renew(self.period, tx.now_ms);
        let Renewal::Renewed(renewed) = renewal else {
            return Ok(Renewed::Done(renewal, member.subscription));
        };
        if let Some(problem) = self.unpaid(tx)? {
            return Ok(Renewed::Unpaid(problem));
        }
        let (period, until) = (
            Param::Integer(renewed.period),
            Param::Integer(renewed.paid_until_ms),
        );
        tx.write(
            "INSERT INTO renewal (member_id, period, paid_until_ms, at_ms, order_id)
             VALUES (?1, ?2, ?3, ?4, ?5)",
            &[
                text(&self.member_id),
                period.clone(),
                until.clone(),
                Param::Integer(tx.now_ms),
                self.order.param(),
            ],
        )?;
        tx.write(
            "UPDATE member SET period = ?2, paid_until_ms = ?3 WHERE id = ?1",
            &[text(&self.member_id), period, until],
        )?;
        Ok(Renewed::Done(renewal, renewed))
    }

    fn committed(&self, output: &Self::Output, metrics: &Metrics) {
        metrics.renewal(output);
    }
}

impl Renew {
    /// Why the order buys no period; none if it does.
    fn unpaid(&self, tx: &mut Tx<'_>) -> Result<Option<&'static str>, StoreError> {
        let Some(order) = command::find(tx.connection(), Some(&self.principal), self.order)? else {
            return Ok(Some("There is no such order."));
        };
        if order.status != Status::Paid {
            return Ok(Some("The order is not paid, or was refunded."));
        }
        let is_one = |line: &Line| line.sku == self.sku && line.quantity == 1;
        if order.lines.iter().filter(|line| is_one(line)).count() != 1 {
            return Ok(Some("The order is not for one period of membership."));
        }
        Ok(is_spent(tx, self.order)?.then_some("The order has bought another period."))
    }
}

/// Whether an order has bought a period.
pub(super) fn is_spent(tx: &mut Tx<'_>, order: OrderId) -> Result<bool, StoreError> {
    let spent = tx.query(
        "SELECT 1 FROM renewal WHERE order_id = ?1",
        &[order.param()],
    )?;
    Ok(!spent.is_empty())
}

/// The signing keys.
///
/// # Errors
/// [`SqlError`]
pub fn keys(connection: &mut dyn Connection) -> Result<Ring, SqlError> {
    let rows = connection.query("SELECT seed, created_at_ms FROM signing_key", &[])?;
    let keys = rows
        .into_iter()
        .map(|mut row| {
            let seed: Vec<u8> = row.take()?;
            let seed = seed
                .try_into()
                .map_err(|_| SqlError::Column("a key's seed"))?;
            Key::from_seed(&seed, row.take()?).map_err(|_| SqlError::Column("a key's seed"))
        })
        .collect::<Result<_, _>>()?;
    Ok(Ring::new(keys))
}

/// Adds a key if one is due, and returns the ring. Machines that ask at once add one key.
pub struct RotateKeys {
    /// A random seed, used when a key is due.
    pub seed: [u8; 32],
}

impl Command for RotateKeys {
    type Output = Ring;

    fn locks(&self, locks: &mut Locks) {
        locks.name("signing-key", "ring");
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Ring, StoreError> {
        let ring = keys(tx.connection())?;
        if !ring.wants_key(tx.now_ms) {
            return Ok(ring);
        }
        let key = Key::from_seed(&self.seed, tx.now_ms)
            .map_err(|_| StoreError::Inconsistent("a seed makes no key"))?;
        tx.write(
            "INSERT INTO signing_key (id, seed, created_at_ms) VALUES (?1, ?2, ?3)",
            &[text(key.id()), blob(&self.seed), Param::Integer(tx.now_ms)],
        )?;
        Ok(keys(tx.connection())?)
    }
}
