//! What an expression reads: wanted labels carried from its result down to the series, through
//! recorded rules too.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use promql_parser::label::{METRIC_NAME, MatchOp};
use promql_parser::parser::token::{T_BOTTOMK, T_TOPK};
use promql_parser::parser::{
    self, AggregateExpr, BinaryExpr, Call, Expr, LabelModifier, VectorMatchCardinality,
    VectorSelector,
};

use super::source::Source;
use super::{Expression, Labels, Use};

/// Parses all, then follows each through the rules it reads.
pub(super) fn resolve(sources: Vec<Source>) -> Result<Vec<Expression>> {
    let mut parsed = Vec::new();
    for source in sources {
        let expr = parser::parse(&source.text)
            .map_err(|error| anyhow::anyhow!("{}: {}: {error}", source.place, source.text))?;
        parsed.push((source, expr));
    }
    let mut rules = BTreeMap::new();
    for (source, expr) in &parsed {
        if let Some(name) = &source.records {
            rules.insert(name.as_str(), (expr, &source.added));
        }
    }
    let mut expressions = Vec::new();
    for (source, expr) in &parsed {
        let mut walk = Walk {
            rules: &rules,
            following: Vec::new(),
            uses: Vec::new(),
        };
        walk.expr(expr, &source.shown)
            .with_context(|| format!("{}: {}", source.place, source.text))?;
        expressions.push(Expression {
            place: source.place.clone(),
            text: source.text.clone(),
            records: source.records.clone(),
            uses: walk.uses,
        });
    }
    Ok(expressions)
}

/// Carries wanted labels from an expression's result down to the series it reads.
struct Walk<'a> {
    rules: &'a BTreeMap<&'a str, (&'a Expr, &'a Labels)>,
    /// Recorded series being followed, outermost first.
    following: Vec<String>,
    uses: Vec<Use>,
}

impl Walk<'_> {
    fn expr(&mut self, expr: &Expr, wanted: &Labels) -> Result<()> {
        match expr {
            Expr::Aggregate(aggregate) => self.aggregate(aggregate, wanted),
            Expr::Binary(binary) => self.binary(binary, wanted),
            Expr::Call(call) => self.call(call, wanted),
            Expr::Paren(paren) => self.expr(&paren.expr, wanted),
            Expr::Unary(unary) => self.expr(&unary.expr, wanted),
            Expr::Subquery(subquery) => self.expr(&subquery.expr, wanted),
            Expr::VectorSelector(selector) => self.selector(selector, wanted),
            Expr::MatrixSelector(matrix) => self.selector(&matrix.vs, wanted),
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => Ok(()),
        }
    }

    fn aggregate(&mut self, aggregate: &AggregateExpr, wanted: &Labels) -> Result<()> {
        if let Some(parameter) = &aggregate.param {
            self.expr(parameter, &Labels::new())?;
        }
        let named = aggregate
            .modifier
            .as_ref()
            .map(named_labels)
            .unwrap_or_default();
        let keeps_all = matches!(aggregate.op.id(), T_TOPK | T_BOTTOMK);
        let excludes = matches!(aggregate.modifier, Some(LabelModifier::Exclude(_)));
        for label in wanted {
            let kept = keeps_all || named.contains(label) != excludes;
            ensure!(
                kept,
                "label `{label}` is not in the result of `{aggregate}`"
            );
        }
        self.expr(&aggregate.expr, &(wanted | &named))
    }

    fn binary(&mut self, binary: &BinaryExpr, wanted: &Labels) -> Result<()> {
        let Some(matching) = binary.modifier.as_ref().and_then(|m| m.matching.as_ref()) else {
            // Series are paired by all their labels, so both sides have the same.
            self.expr(&binary.lhs, wanted)?;
            return self.expr(&binary.rhs, wanted);
        };
        let on = if matching.is_include() {
            named_labels(matching)
        } else {
            Labels::new()
        };
        let card = binary.modifier.as_ref().map(|modifier| &modifier.card);
        let (many, one) = match card {
            Some(VectorMatchCardinality::OneToMany(_)) => (&binary.rhs, &binary.lhs),
            _ => (&binary.lhs, &binary.rhs),
        };
        // group_left (label) brings labels over from the one side.
        let brought = card.and_then(VectorMatchCardinality::labels);
        let brought: Labels = brought
            .map(|b| b.labels.iter().cloned().collect())
            .unwrap_or_default();
        self.expr(many, &(&(wanted - &brought) | &on))?;
        self.expr(one, &(&brought | &on))
    }

    fn call(&mut self, call: &Call, wanted: &Labels) -> Result<()> {
        let mut wanted = wanted.clone();
        match call.func.name {
            // Their results have no labels, or only those of the text.
            "scalar" | "absent" | "absent_over_time" => wanted.clear(),
            "histogram_quantile" => {
                ensure!(
                    !wanted.contains("le"),
                    "histogram_quantile has no label `le`"
                );
                wanted.insert("le".to_owned());
            }
            _ => {}
        }
        call.args
            .args
            .iter()
            .try_for_each(|argument| self.expr(argument, &wanted))
    }

    fn selector(&mut self, selector: &VectorSelector, wanted: &Labels) -> Result<()> {
        let matchers = &selector.matchers;
        ensure!(
            matchers.or_matchers.is_empty(),
            "`or` between matchers is not PromQL"
        );
        let by_label = matchers.matchers.iter().find(|m| m.name == METRIC_NAME);
        let by_label = by_label
            .filter(|m| matches!(m.op, MatchOp::Equal))
            .map(|m| &m.value);
        let Some(metric) = selector.name.as_ref().or(by_label) else {
            bail!("`{selector}` names no metric");
        };
        let names = matchers.matchers.iter().map(|matcher| matcher.name.clone());
        let mut labels: Labels = names.filter(|name| name != METRIC_NAME).collect();
        labels.extend(wanted.iter().cloned());
        let rule = self.rules.get(metric.as_str()).copied();
        self.uses.push(Use {
            metric: metric.clone(),
            labels: labels.clone(),
            recorded: rule.is_some(),
        });
        let Some((expr, added)) = rule else {
            return Ok(());
        };
        ensure!(
            !self.following.contains(metric),
            "`{metric}` is recorded from itself"
        );
        self.following.push(metric.clone());
        self.expr(expr, &(&labels - added))
            .with_context(|| format!("recorded as `{metric}`"))?;
        self.following.pop();
        Ok(())
    }
}

fn named_labels(modifier: &LabelModifier) -> Labels {
    modifier.labels().labels.iter().cloned().collect()
}
