//! FOCUS rows as Parquet: decimals stay decimals, with the scale each column needs.

use std::sync::Arc;

use num_bigint::BigInt;
use parquet::{
    basic::{LogicalType, Repetition, TimeUnit, Type as Physical},
    data_type::{ByteArray, ByteArrayType, FixedLenByteArray, FixedLenByteArrayType, Int64Type},
    errors::ParquetError,
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::types::{Type, TypePtr},
};

use super::focus::{COLUMNS, Column, Record};

/// Digits of a decimal that every reader takes.
const DIGITS: usize = 38;
/// Digits of a decimal that fits 32 bytes, for prices with more places than usual.
const DIGITS_WIDE: usize = 76;

/// Writes the rows as one file in memory.
///
/// # Errors
/// A value has more than 76 digits, or is not what its column holds.
pub fn write(records: &[Record]) -> Result<Vec<u8>, ParquetError> {
    let shapes: Vec<Shape> = COLUMNS
        .iter()
        .enumerate()
        .map(|(index, (_, column))| {
            Shape::of(
                *column,
                records.iter().filter_map(|record| record[index].as_deref()),
            )
        })
        .collect();
    let fields: Vec<TypePtr> = COLUMNS
        .iter()
        .zip(&shapes)
        .map(|((name, _), shape)| shape.field(name).map(Arc::new))
        .collect::<Result<_, _>>()?;
    let schema = Type::group_type_builder("cost_and_usage")
        .with_fields(fields)
        .build()?;
    let properties = Arc::new(WriterProperties::builder().build());
    let mut file = SerializedFileWriter::new(Vec::new(), Arc::new(schema), properties)?;
    let mut group = file.next_row_group()?;
    let mut index = 0;
    while let Some(mut writer) = group.next_column()? {
        let values = records.iter().filter_map(|record| record[index].as_deref());
        let levels: Vec<i16> = records
            .iter()
            .map(|record| i16::from(record[index].is_some()))
            .collect();
        match &shapes[index] {
            Shape::Text => {
                let values: Vec<ByteArray> = values.map(ByteArray::from).collect();
                writer
                    .typed::<ByteArrayType>()
                    .write_batch(&values, Some(&levels), None)?;
            }
            Shape::Time => {
                let values: Vec<i64> = values.map(milliseconds).collect::<Result<_, _>>()?;
                writer
                    .typed::<Int64Type>()
                    .write_batch(&values, Some(&levels), None)?;
            }
            Shape::Decimal { digits, scale } => {
                let width = width(*digits);
                let values: Vec<FixedLenByteArray> = values
                    .map(|text| fixed(text, *scale, width))
                    .collect::<Result<_, _>>()?;
                writer.typed::<FixedLenByteArrayType>().write_batch(
                    &values,
                    Some(&levels),
                    None,
                )?;
            }
        }
        writer.close()?;
        index += 1;
    }
    group.close()?;
    file.into_inner()
}

/// A column's type, as wide as its values.
enum Shape {
    Text,
    Time,
    Decimal { digits: usize, scale: usize },
}

impl Shape {
    fn of<'v>(column: Column, values: impl Iterator<Item = &'v str>) -> Self {
        match column {
            Column::Text => Self::Text,
            Column::Time => Self::Time,
            Column::Integer => Self::Decimal {
                digits: DIGITS,
                scale: 0,
            },
            Column::Decimal => {
                let (mut whole, mut scale) = (1, 9);
                for value in values {
                    let (integer, fraction) = value.split_once('.').unwrap_or((value, ""));
                    whole = whole.max(integer.trim_start_matches('-').len());
                    scale = scale.max(fraction.len());
                }
                let digits = if whole + scale <= DIGITS {
                    DIGITS
                } else {
                    DIGITS_WIDE
                };
                Self::Decimal { digits, scale }
            }
        }
    }

    fn field(&self, name: &str) -> Result<Type, ParquetError> {
        let physical = match self {
            Self::Text => Physical::BYTE_ARRAY,
            Self::Time => Physical::INT64,
            Self::Decimal { .. } => Physical::FIXED_LEN_BYTE_ARRAY,
        };
        let builder =
            Type::primitive_type_builder(name, physical).with_repetition(Repetition::OPTIONAL);
        match self {
            Self::Text => builder.with_logical_type(Some(LogicalType::String)).build(),
            Self::Time => builder
                .with_logical_type(Some(LogicalType::timestamp(true, TimeUnit::MILLIS)))
                .build(),
            Self::Decimal { digits, scale } => builder
                .with_length(i32::try_from(width(*digits)).unwrap_or(i32::MAX))
                .with_precision(i32::try_from(*digits).unwrap_or(i32::MAX))
                .with_scale(i32::try_from(*scale).unwrap_or(i32::MAX))
                .with_logical_type(Some(LogicalType::decimal(
                    i32::try_from(*scale).unwrap_or(i32::MAX),
                    i32::try_from(*digits).unwrap_or(i32::MAX),
                )))
                .build(),
        }
    }
}

/// Bytes that hold a decimal of so many digits.
fn width(digits: usize) -> usize {
    if digits <= DIGITS { 16 } else { 32 }
}

fn milliseconds(text: &str) -> Result<i64, ParquetError> {
    text.parse::<chrono::DateTime<chrono::Utc>>()
        .map(|at| at.timestamp_millis())
        .map_err(|error| ParquetError::General(format!("{text}: {error}")))
}

/// A decimal's digits at a scale, as big-endian two's complement.
fn fixed(text: &str, scale: usize, width: usize) -> Result<FixedLenByteArray, ParquetError> {
    let wrong = || ParquetError::General(format!("{text} does not fit a decimal of its column"));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    // CSV's `.0` is no digit of a whole number.
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > scale {
        return Err(wrong());
    }
    let number: BigInt = format!("{whole}{fraction:0<scale$}")
        .parse()
        .map_err(|_| wrong())?;
    let bytes = number.to_signed_bytes_be();
    if bytes.len() > width {
        return Err(wrong());
    }
    let fill = if number.sign() == num_bigint::Sign::Minus {
        0xff
    } else {
        0
    };
    let mut padded = vec![fill; width];
    padded[width - bytes.len()..].copy_from_slice(&bytes);
    Ok(ByteArray::from(padded).into())
}
