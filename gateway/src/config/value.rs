//! Values and lists that several sections write.

use std::ops::Range;
use std::time::Duration;

use http::HeaderName;

use super::check::Checker;
use super::pattern::Refused;
use super::raw::{Number, Text};

impl Checker<'_> {
    pub(super) fn accepted<T>(
        &mut self,
        result: Result<T, Refused>,
        text: &Text,
        field: &str,
    ) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err((wrong, fix)) => {
                let wrong = format!("\"{}\" {wrong}", text.get_ref());
                self.report(text.span(), field, wrong, fix);
                None
            }
        }
    }

    /// A list that, when written, is neither empty nor repeats itself.
    pub(super) fn list<T: PartialEq>(
        &mut self,
        list: &[Text],
        at: Range<usize>,
        field: &str,
        mut item: impl FnMut(&mut Self, &Text, &str) -> Option<T>,
    ) -> Option<Vec<T>> {
        if list.is_empty() {
            let fix = "leave it out to mean all, or name at least one";
            self.report(at, field, "is empty", fix);
            return None;
        }
        let mut values: Vec<Option<T>> = Vec::new();
        for (index, text) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            let value = item(self, text, &field);
            if value.is_some() && values.contains(&value) {
                let wrong = format!("\"{}\" is already in the list", text.get_ref());
                self.report(text.span(), field, wrong, "delete it");
            }
            values.push(value);
        }
        values.into_iter().collect()
    }

    pub(super) fn header_name(&mut self, text: &Text, field: &str) -> Option<HeaderName> {
        let header: Option<HeaderName> = text.get_ref().parse().ok();
        if header.is_none() {
            let wrong = format!("\"{}\" is not a header name", text.get_ref());
            let fix = "write such as `header = \"x-tenant\"`";
            self.report(text.span(), field, wrong, fix);
        }
        header
    }

    /// `Some(None)` when left out.
    pub(super) fn optional_ms(
        &mut self,
        raw: Option<&Number>,
        field: &str,
    ) -> Option<Option<Duration>> {
        match raw {
            Some(_) => self
                .number(raw, field, 1..=3_600_000, 1)
                .map(|ms| Some(Duration::from_millis(ms))),
            None => Some(None),
        }
    }
}
