//! The shared backend: one PostgreSQL database for several gateways.
//!
//! The connection is made again when it breaks. A commit whose answer was lost is reported as
//! uncertain: the ledger finds out before it posts on.

use std::{collections::HashMap, error::Error as _, str::FromStr as _, time::Duration};

use ::postgres::{
    Client, Config, IsolationLevel, NoTls, Statement, Transaction,
    config::SslMode,
    error::SqlState,
    types::{IsNull, ToSql, Type, to_sql_checked},
};

use bytes::BytesMut;

use super::sql::{Access, Database, Dialect, Fault, Row, SqlError, Statements, Value, Work};

/// How long to wait for a server that does not answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a statement may take: a tick must not hang on a lock for ever.
const STATEMENT_TIMEOUT_MS: u32 = 30_000;

/// A server.
pub(super) struct Postgres {
    config: Config,
    connection: Option<Connection>,
    /// The gateway this process posts for.
    taken: Option<i64>,
}

struct Connection {
    client: Client,
    statements: HashMap<String, Statement>,
}

impl Postgres {
    /// Connects.
    pub(super) fn open(url: &str) -> Result<Self, SqlError> {
        let mut config = parse(url).map_err(|what| SqlError::new(Fault::Other, what))?;
        config
            .connect_timeout(CONNECT_TIMEOUT)
            .application_name("edgemeter");
        let mut database = Self {
            config,
            connection: None,
            taken: None,
        };
        apart(|| database.connect().map(|_| ()))?;
        Ok(database)
    }

    fn connect(&mut self) -> Result<&mut Connection, SqlError> {
        if self
            .connection
            .as_ref()
            .is_none_or(|c| c.client.is_closed())
        {
            self.connection = None;
            let mut client = self
                .config
                .connect(NoTls)
                .map_err(|error| refused(&error))?;
            client
                .batch_execute(&format!(
                    "SET statement_timeout = {STATEMENT_TIMEOUT_MS}; SET synchronous_commit = on; \
                     SET client_min_messages = warning"
                ))
                .map_err(|error| refused(&error))?;
            let mut connection = Connection {
                client,
                statements: HashMap::new(),
            };
            if let Some(gateway) = self.taken {
                lock(&mut connection, gateway)?;
            }
            self.connection = Some(connection);
        }
        self.connection
            .as_mut()
            .ok_or_else(|| SqlError::new(Fault::Unavailable, "not connected"))
    }

    fn attempt(&mut self, access: Access, work: Work<'_>) -> Result<(), SqlError> {
        let connection = self.connect()?;
        let mut running = Running {
            transaction: connection
                .client
                .build_transaction()
                .isolation_level(IsolationLevel::RepeatableRead)
                .read_only(access == Access::Read)
                .start()
                .map_err(|error| refused(&error))?,
            statements: &mut connection.statements,
        };
        work(&mut running)?;
        running.transaction.commit().map_err(|error| {
            let mut error = refused(&error);
            if error.fault == Fault::Unavailable {
                error.fault = Fault::Uncertain;
            }
            error
        })
    }
}

/// Reads a URL, and refuses what this client cannot keep.
pub(super) fn parse(url: &str) -> Result<Config, String> {
    let config = Config::from_str(url).map_err(|error| {
        let cause = error.source().map(ToString::to_string);
        cause.unwrap_or_else(|| error.to_string())
    })?;
    if config.get_ssl_mode() == SslMode::Require {
        return Err(
            "sslmode=require is not supported: use a Unix socket, a private network or a TLS \
             tunnel, and leave sslmode out"
                .into(),
        );
    }
    Ok(config)
}

/// A session lock: the server gives it back when the session ends, however it ends.
fn lock(connection: &mut Connection, gateway: i64) -> Result<(), SqlError> {
    // The first key keeps us apart from other users of advisory locks.
    let row = connection
        .client
        .query_one(
            "SELECT pg_try_advisory_lock(hashtext('edgemeter'), $1::bigint::int)",
            &[&gateway],
        )
        .map_err(|error| refused(&error))?;
    if row.get::<_, bool>(0) {
        return Ok(());
    }
    Err(SqlError::new(
        Fault::Stale,
        "in use by another edgemeter with the same gateway.id; stop it first, or give this one \
         another gateway.id",
    ))
}

fn unlock(connection: &mut Connection) -> Result<(), SqlError> {
    connection
        .client
        .batch_execute("SELECT pg_advisory_unlock_all()")
        .map_err(|error| refused(&error))
}

impl Database for Postgres {
    fn dialect(&self) -> Dialect {
        Dialect::Postgres
    }

    fn transaction(&mut self, access: Access, work: Work<'_>) -> Result<(), SqlError> {
        apart(|| self.attempt(access, work))
    }

    fn take(&mut self, gateway: i64) -> Result<(), SqlError> {
        apart(|| {
            lock(self.connect()?, gateway)?;
            self.taken = Some(gateway);
            Ok(())
        })
    }

    fn give_up(&mut self) -> Result<(), SqlError> {
        self.taken = None;
        apart(|| unlock(self.connect()?))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let connection = self.connection.take();
        let _ = apart(|| {
            drop(connection);
            Ok(())
        });
    }
}

/// Runs the client's own event loop where no other one is: it refuses to run inside one.
fn apart<T: Send>(work: impl FnOnce() -> Result<T, SqlError> + Send) -> Result<T, SqlError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("ledger".into())
            .spawn_scoped(scope, work)
            .map_err(|error| SqlError::new(Fault::Unavailable, error.to_string()))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(SqlError::new(Fault::Other, "the database client panicked")))
    })
}

struct Running<'c> {
    transaction: Transaction<'c>,
    statements: &'c mut HashMap<String, Statement>,
}

impl Running<'_> {
    fn prepared(&mut self, sql: &str) -> Result<Statement, SqlError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self
            .transaction
            .prepare(&sql.replace('?', "$"))
            .map_err(|error| refused(&error))?;
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }
}

impl Statements for Running<'_> {
    fn execute(&mut self, sql: &str, values: &[Value]) -> Result<u64, SqlError> {
        if values.is_empty() {
            let done = self.transaction.batch_execute(sql);
            return done.map(|()| 0).map_err(|error| refused(&error));
        }
        let statement = self.prepared(sql)?;
        self.transaction
            .execute(&statement, &parameters(values))
            .map_err(|error| refused(&error))
    }

    fn query(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Row>, SqlError> {
        let statement = self.prepared(sql)?;
        let rows = self
            .transaction
            .query(&statement, &parameters(values))
            .map_err(|error| refused(&error))?;
        rows.iter()
            .map(|row| {
                let values = row.columns().iter().enumerate().map(|(index, column)| {
                    let value = match *column.type_() {
                        Type::INT8 => row.try_get::<_, Option<i64>>(index).map(Value::from),
                        Type::INT4 => row
                            .try_get::<_, Option<i32>>(index)
                            .map(|value| Value::from(value.map(i64::from))),
                        Type::TEXT => row
                            .try_get::<_, Option<String>>(index)
                            .map(|text| text.map_or(Value::Null, Value::Text)),
                        Type::BYTEA => row
                            .try_get::<_, Option<Vec<u8>>>(index)
                            .map(|bytes| bytes.map_or(Value::Null, Value::Blob)),
                        ref other => {
                            return Err(SqlError::new(
                                Fault::Other,
                                format!("column {} is of type {other}", column.name()),
                            ));
                        }
                    };
                    value.map_err(|error| refused(&error))
                });
                Ok(Row(values.collect::<Result<_, _>>()?))
            })
            .collect()
    }
}

fn parameters(values: &[Value]) -> Vec<&(dyn ToSql + Sync)> {
    values
        .iter()
        .map(|value| value as &(dyn ToSql + Sync))
        .collect()
}

impl ToSql for Value {
    fn to_sql(
        &self,
        kind: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Int(value) if *kind == Type::INT4 => i32::try_from(*value)?.to_sql(kind, out),
            Self::Int(value) => value.to_sql(kind, out),
            Self::Text(text) => text.to_sql(kind, out),
            Self::Blob(bytes) => bytes.to_sql(kind, out),
            Self::Null => Ok(IsNull::Yes),
        }
    }

    fn accepts(kind: &Type) -> bool {
        [Type::INT8, Type::INT4, Type::TEXT, Type::BYTEA].contains(kind)
    }

    to_sql_checked!();
}

/// Sorts the server's errors by what can be done about them.
fn refused(error: &::postgres::Error) -> SqlError {
    let fault = match error.code() {
        Some(code) if *code == SqlState::DISK_FULL => Fault::Full,
        Some(code) if *code == SqlState::READ_ONLY_SQL_TRANSACTION => Fault::ReadOnly,
        Some(code) if *code == SqlState::DATA_CORRUPTED || *code == SqlState::INDEX_CORRUPTED => {
            Fault::Damaged
        }
        // Class 57: shut down; 08: connection.
        Some(code) if code.code().starts_with("57") || code.code().starts_with("08") => {
            Fault::Unavailable
        }
        Some(_) => Fault::Other,
        None => Fault::Unavailable,
    };
    // The top of the chain says only "db error".
    let what = match error.as_db_error() {
        Some(error) => error.message().to_owned(),
        None => match error.source() {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        },
    };
    SqlError::new(fault, what)
}
