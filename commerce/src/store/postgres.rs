//! PostgreSQL: the ledger when several machines serve.
//!
//! One connection on a runtime of its own, used by one thread. Statements whose outcome
//! nobody waits for are sent at once and read back before the commit, so that an order costs
//! the round trips of its decisions only.

use std::collections::HashMap;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::BytesMut;
use tokio::runtime::Runtime;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, NoTls, Statement};

use super::sql::{Backend, Connection, Param, Row, SqlError, Value, for_postgres};

type Written = Pin<Box<dyn Future<Output = Result<u64, tokio_postgres::Error>> + Send>>;

/// One connection.
pub(super) struct Postgres {
    url: String,
    runtime: Own,
    client: Arc<Client>,
    statements: HashMap<String, Statement>,
    /// Sent, and not yet known to have succeeded.
    written: Vec<Written>,
    in_transaction: bool,
}

impl Postgres {
    pub(super) fn open(url: &str) -> Result<Self, SqlError> {
        let runtime = Own::new()?;
        let client = connect(&runtime, url)?;
        Ok(Self {
            url: url.to_owned(),
            runtime,
            client,
            statements: HashMap::new(),
            written: Vec::new(),
            in_transaction: false,
        })
    }

    fn statement(&mut self, sql: &str) -> Result<Statement, SqlError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let prepared = self
            .runtime
            .block_on(self.client.prepare(&for_postgres(sql)))?;
        self.statements.insert(sql.to_owned(), prepared.clone());
        Ok(prepared)
    }

    /// Waits for everything that was sent. The first failure is the reason of the others.
    fn settle(&mut self) -> Result<(), SqlError> {
        let written = std::mem::take(&mut self.written);
        if written.is_empty() {
            return Ok(());
        }
        self.runtime.block_on(async {
            let mut outcome = Ok(());
            for one in written {
                let done = one.await.map(drop);
                if outcome.is_ok() {
                    outcome = done;
                }
            }
            outcome
        })?;
        Ok(())
    }

    /// The first failure among what was sent before explains why this one failed.
    fn explain(&mut self, error: tokio_postgres::Error) -> SqlError {
        match self.settle() {
            Err(earlier) => earlier,
            Ok(()) => error.into(),
        }
    }
}

/// A runtime that may be dropped anywhere: on another runtime's thread, waiting for its tasks
/// would panic, and there is nothing to wait for.
struct Own(Option<Runtime>);

impl Own {
    fn new() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }
}

impl Deref for Own {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        // Taken in `drop` only.
        self.0.as_ref().unwrap_or_else(|| unreachable!())
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn connect(runtime: &Runtime, url: &str) -> Result<Arc<Client>, SqlError> {
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::warn!(%error, "a connection to PostgreSQL ended");
            }
        });
        // What an acknowledged order rests on, whatever the server's default is.
        client
            .batch_execute("SET synchronous_commit = on; SET lock_timeout = '20s'")
            .await?;
        Ok(Arc::new(client))
    })
}

impl ToSql for Param<'_> {
    fn to_sql(
        &self,
        kind: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Null => Ok(IsNull::Yes),
            Self::Integer(number) if *kind == Type::INT4 => {
                i32::try_from(*number)?.to_sql(kind, out)
            }
            Self::Integer(number) => number.to_sql(kind, out),
            Self::Text(text) => text.as_ref().to_sql(kind, out),
            Self::Uuid(uuid) => {
                let mut buffer = uuid::Uuid::encode_buffer();
                let text: &str = uuid.hyphenated().encode_lower(&mut buffer);
                text.to_sql(kind, out)
            }
            Self::Blob(bytes) => bytes.as_ref().to_sql(kind, out),
        }
    }

    fn accepts(kind: &Type) -> bool {
        matches!(
            *kind,
            Type::INT4 | Type::INT8 | Type::TEXT | Type::VARCHAR | Type::BYTEA
        )
    }

    to_sql_checked!();
}

fn references<'a>(params: &'a [Param<'a>]) -> Vec<&'a (dyn ToSql + Sync)> {
    params
        .iter()
        .map(|param| -> &'a (dyn ToSql + Sync) { param })
        .collect()
}

fn value(row: &tokio_postgres::Row, column: usize) -> Result<Value, SqlError> {
    let kind = row.columns().get(column).map(|column| column.type_());
    let found = match kind {
        Some(&Type::INT8) => row.try_get::<_, Option<i64>>(column)?.map(Value::Integer),
        Some(&Type::INT4) => row
            .try_get::<_, Option<i32>>(column)?
            .map(|number| Value::Integer(number.into())),
        Some(&Type::BOOL) => row
            .try_get::<_, Option<bool>>(column)?
            .map(|truth| Value::Integer(truth.into())),
        Some(&Type::TEXT | &Type::VARCHAR) => {
            row.try_get::<_, Option<String>>(column)?.map(Value::Text)
        }
        Some(&Type::BYTEA) => row.try_get::<_, Option<Vec<u8>>>(column)?.map(Value::Blob),
        _ => return Err(SqlError::Column("a known type")),
    };
    Ok(found.unwrap_or(Value::Null))
}

impl Connection for Postgres {
    fn backend(&self) -> Backend {
        Backend::Postgres
    }

    fn query(&mut self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>, SqlError> {
        let statement = self.statement(sql)?;
        let found = self
            .runtime
            .block_on(self.client.query(&statement, &references(params)));
        let found = found.map_err(|error| self.explain(error))?;
        found
            .iter()
            .map(|row| {
                let values = (0..row.len())
                    .map(|column| value(row, column))
                    .collect::<Result<_, _>>()?;
                Ok(Row::new(values))
            })
            .collect()
    }

    fn execute(&mut self, sql: &str, params: &[Param<'_>]) -> Result<u64, SqlError> {
        let statement = self.statement(sql)?;
        let done = self
            .runtime
            .block_on(self.client.execute(&statement, &references(params)));
        done.map_err(|error| self.explain(error))
    }

    fn write(&mut self, sql: &str, params: &[Param<'_>]) -> Result<(), SqlError> {
        let statement = self.statement(sql)?;
        let client = Arc::clone(&self.client);
        let params: Vec<Param<'static>> = params
            .iter()
            .map(|param| param.clone().into_owned())
            .collect();
        let mut sent: Written = Box::pin(async move {
            let params = references(&params);
            client.execute(&statement, &params).await
        });
        // The first poll puts the message on the connection's queue: before anything that is
        // asked later. Nobody needs to be woken; `settle` polls again.
        match sent.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(done) => {
                done.map_err(|error| self.explain(error))?;
            }
            Poll::Pending => self.written.push(sent),
        }
        Ok(())
    }

    fn script(&mut self, sql: &str) -> Result<(), SqlError> {
        let done = self.runtime.block_on(self.client.batch_execute(sql));
        done.map_err(|error| self.explain(error))
    }

    fn begin(&mut self) -> Result<(), SqlError> {
        self.in_transaction = true;
        self.write("BEGIN", &[])
    }

    fn begin_snapshot(&mut self) -> Result<(), SqlError> {
        self.in_transaction = true;
        self.write("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", &[])
    }

    fn commit(&mut self) -> Result<(), SqlError> {
        // A failed statement turns COMMIT into ROLLBACK without an error: look first.
        self.write("COMMIT", &[])?;
        self.settle()?;
        self.in_transaction = false;
        Ok(())
    }

    fn rollback(&mut self) -> Result<(), SqlError> {
        // Their outcomes are the reason for this rollback.
        let _ = self.settle();
        if self.in_transaction {
            self.in_transaction = false;
            self.execute("ROLLBACK", &[])?;
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<(), SqlError> {
        if self.client.is_closed() {
            self.written.clear();
            self.statements.clear();
            self.in_transaction = false;
            self.client = connect(&self.runtime, &self.url)?;
        }
        Ok(())
    }
}
