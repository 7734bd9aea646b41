//! What fills columns: one value, or several.

use std::borrow::Cow;

use uuid::Uuid;

use super::{Param, Row, SqlError, Value};

/// Something that fills a fixed number of columns.
pub trait Field: Sized {
    /// Appends one parameter per column.
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>);
    /// Reads its columns.
    ///
    /// # Errors
    /// [`SqlError::Column`] when they hold something else.
    fn load(row: &mut Row) -> Result<Self, SqlError>;
}

impl Field for i64 {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(*self));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match row.value() {
            Value::Integer(number) => Ok(number),
            _ => Err(SqlError::Column("an integer")),
        }
    }
}

impl Field for u32 {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(i64::from(*self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::try_from(i64::load(row)?).map_err(|_| SqlError::Column("a 32-bit count"))
    }
}

impl Field for u16 {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(i64::from(*self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::try_from(i64::load(row)?).map_err(|_| SqlError::Column("a 16-bit count"))
    }
}

impl Field for bool {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(i64::from(*self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Ok(i64::load(row)? != 0)
    }
}

impl Field for String {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(Cow::Borrowed(self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match row.value() {
            Value::Text(text) => Ok(text),
            _ => Err(SqlError::Column("text")),
        }
    }
}

impl Field for Vec<u8> {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Blob(Cow::Borrowed(self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match row.value() {
            Value::Blob(bytes) => Ok(bytes),
            _ => Err(SqlError::Column("bytes")),
        }
    }
}

impl Field for Uuid {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Uuid(*self));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::try_parse(&String::load(row)?).map_err(|_| SqlError::Column("a UUID"))
    }
}

/// One column; NULL is `None`.
impl<T: Field> Field for Option<T> {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        match self {
            Some(field) => field.store(params),
            None => params.push(Param::Null),
        }
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        if row.values.as_slice().first().unwrap_or(&Value::Null) == &Value::Null {
            row.value();
            return Ok(None);
        }
        T::load(row).map(Some)
    }
}
