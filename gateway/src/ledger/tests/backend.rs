//! Both backends for the same tests, and a database that fails where it is told to.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use xtask::server::Postgres;

use crate::ledger::{
    Ledger, LedgerError, Place, postgres,
    sql::{Access, Database, Dialect, Fault, Row, SqlError, Statements, Value, Work},
    sqlite,
};

/// An empty ledger's place.
pub(crate) struct Backend {
    pub(crate) name: &'static str,
    pub(crate) place: Place,
    _directory: tempfile::TempDir,
}

impl Backend {
    pub(crate) fn file() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            name: "sqlite",
            place: Place::in_directory(directory.path()),
            _directory: directory,
        }
    }

    pub(crate) fn shared() -> Self {
        let url = Postgres::shared().unwrap().create_database().unwrap();
        Self {
            name: "postgres",
            place: Place::shared(&url).unwrap(),
            _directory: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn open(&self) -> Ledger {
        self.try_open().unwrap()
    }

    pub(crate) fn try_open(&self) -> Result<Ledger, LedgerError> {
        Ledger::open_at(&self.place, "edge-1")
    }

    /// A ledger whose database fails as planned.
    pub(crate) fn open_failing(&self, plan: &Plan) -> Ledger {
        let inner: Box<dyn Database> = match &self.place {
            Place::File(path) => Box::new(sqlite::Sqlite::open(path).unwrap()),
            Place::Shared(url) => Box::new(postgres::Postgres::open(url).unwrap()),
        };
        let failing = Failing {
            inner,
            plan: plan.clone(),
        };
        let ledger = Ledger::over(Box::new(failing), self.place.clone(), "edge-1").unwrap();
        // The longest way a row can go.
        ledger.begin_by_second(true);
        ledger
    }
}

/// Runs a test on both backends.
pub(crate) fn on_both(test: impl Fn(&Backend)) {
    for backend in [Backend::file(), Backend::shared()] {
        println!("on {}", backend.name);
        test(&backend);
    }
}

/// After how many steps of writing transactions the next failure comes. A step is a statement,
/// the commit, or the answer to the commit.
#[derive(Clone)]
pub(crate) struct Plan(Arc<AtomicI64>);

impl Plan {
    pub(crate) fn never() -> Self {
        Self(Arc::new(AtomicI64::new(-1)))
    }

    pub(crate) fn fail_after(&self, steps: i64) {
        self.0.store(steps, Ordering::SeqCst);
    }

    fn step(&self) -> bool {
        let left = self.0.load(Ordering::SeqCst);
        if left >= 0 {
            self.0.store(left - 1, Ordering::SeqCst);
        }
        left == 0
    }
}

struct Failing {
    inner: Box<dyn Database>,
    plan: Plan,
}

impl Database for Failing {
    fn dialect(&self) -> Dialect {
        self.inner.dialect()
    }

    fn transaction(&mut self, access: Access, work: Work<'_>) -> Result<(), SqlError> {
        if access == Access::Read {
            return self.inner.transaction(access, work);
        }
        let plan = self.plan.clone();
        self.inner.transaction(access, &mut |statements| {
            work(&mut Counting {
                inner: statements,
                plan: &plan,
            })?;
            if plan.step() {
                // The server went away before the commit reached it.
                return Err(SqlError::new(Fault::Uncertain, "planned: commit lost"));
            }
            Ok(())
        })?;
        if plan.step() {
            // It went away before its answer reached us.
            return Err(SqlError::new(Fault::Uncertain, "planned: answer lost"));
        }
        Ok(())
    }

    fn take(&mut self, gateway: i64) -> Result<(), SqlError> {
        self.inner.take(gateway)
    }

    fn give_up(&mut self) -> Result<(), SqlError> {
        self.inner.give_up()
    }
}

struct Counting<'s> {
    inner: &'s mut dyn Statements,
    plan: &'s Plan,
}

impl Statements for Counting<'_> {
    fn execute(&mut self, sql: &str, values: &[Value]) -> Result<u64, SqlError> {
        if self.plan.step() {
            return Err(SqlError::new(
                Fault::Unavailable,
                "planned: statement failed",
            ));
        }
        self.inner.execute(sql, values)
    }

    fn query(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Row>, SqlError> {
        if self.plan.step() {
            return Err(SqlError::new(Fault::Unavailable, "planned: query failed"));
        }
        self.inner.query(sql, values)
    }
}
