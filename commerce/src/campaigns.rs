//! Campaigns at work: the file is read when it changes, customers are dealt, observations are
//! written, experiments are decided, harm is rolled back. The decisions themselves are pure:
//! [`crate::experiment`].
//!
//! What is in force is one atomic pointer. A request takes it once and sees one revision.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::campaign::{Campaign, TEXT_BYTES_MAX};
use crate::census::{Census, Kind};
use crate::command::campaign::{self, Begin, Decide, Judge, Observation, Observe, Publish};
use crate::experiment::assign;
use crate::experiment::decision::{Assessment, Verdict, assess};
use crate::experiment::revision::{Digest, Number, Standing};
use crate::experiment::statistics::Sample;
use crate::metrics::Metrics;
use crate::store::{Store, StoreError, unix_time_ms};

/// Observations that may wait to be written; more are dropped and counted.
const OBSERVATIONS_MAX: usize = 8_192;
/// Observations in one command.
const BATCH_MAX: usize = 128;
/// How often the file and the pointer are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// When things happen.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The campaign file; none for what the database has.
    pub file: Option<PathBuf>,
    /// Between two assessments of the experiments.
    pub assess_every: Duration,
    /// How long a revision serves before it counts as good.
    pub good_after: Duration,
}

/// What is in force.
#[derive(Clone, Debug, Default)]
pub struct Active {
    /// Its revision.
    pub revision: Number,
    /// What it says.
    pub campaign: Campaign,
    /// The variant everybody gets, of experiments that are decided.
    decided: BTreeMap<String, String>,
}

impl Active {
    /// The (experiment, variant) pairs of a customer: what the gateway said where it names a
    /// variant that exists, else the hash of the unit. Decided experiments are no choice.
    #[must_use]
    pub fn variants(&self, header: Option<&str>, unit: Option<&str>) -> Vec<(String, String)> {
        let said: BTreeMap<&str, &str> = header
            .map(|header| assign::parse_header(header).collect())
            .unwrap_or_default();
        self.campaign
            .experiments
            .iter()
            .filter_map(|experiment| {
                let name = experiment.name.as_str();
                let known = |variant: &str| experiment.variants.iter().any(|is| is.name == variant);
                let variant = match (self.decided.get(name), said.get(name), unit) {
                    (Some(decided), ..) => decided.as_str(),
                    (None, Some(said), _) if known(said) => said,
                    (None, _, Some(unit)) => &assign::assign(experiment, unit)?.name,
                    (None, _, None) => return None,
                };
                Some((name.to_owned(), variant.to_owned()))
            })
            .collect()
    }
}

/// Handle to what is in force, and to the log of observations. Cloning shares it.
#[derive(Clone)]
pub struct Campaigns {
    active: Arc<RwLock<Arc<Active>>>,
    observations: mpsc::Sender<Observation>,
    metrics: Metrics,
}

impl Campaigns {
    /// Loads what is in force and starts the work. A faulty file is reported, and what the
    /// database has stays in force.
    ///
    /// # Errors
    /// [`StoreError`] when the database cannot be read or written.
    pub async fn start(
        store: &Store,
        settings: Settings,
        census: &Census,
        metrics: &Metrics,
    ) -> Result<Self, StoreError> {
        let (observations, observed) = mpsc::channel(OBSERVATIONS_MAX);
        let campaigns = Self {
            active: Arc::default(),
            observations,
            metrics: metrics.clone(),
        };
        let mut keeper = Keeper {
            campaigns: campaigns.clone(),
            store: store.clone(),
            settings,
            seen: None,
            since_ms: unix_time_ms(),
        };
        keeper.look().await?;
        census.spawn(Kind::Campaign, keeper.run());
        census.spawn(Kind::Observations, write(store.clone(), observed));
        Ok(campaigns)
    }

    /// What is in force now.
    #[must_use]
    pub fn active(&self) -> Arc<Active> {
        let active = self.active.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&active)
    }

    /// Logs that a unit saw these variants. Decided experiments are no longer logged.
    pub fn exposed(&self, active: &Active, unit: &str, variants: &[(String, String)]) {
        for (name, variant) in variants {
            let Some(experiment) = active.campaign.experiment(name) else {
                continue;
            };
            if active.decided.contains_key(name) {
                continue;
            }
            self.metrics.exposed();
            self.observe(Observation::Exposure {
                name: name.clone(),
                salt: experiment.salt.clone(),
                unit: unit.to_owned(),
                variant: variant.clone(),
            });
        }
    }

    /// Logs that a unit ordered.
    pub fn ordered(&self, unit: &str, order_id: String, total_minor: i64) {
        self.observe(Observation::Outcome {
            order_id,
            unit: unit.to_owned(),
            total_minor,
        });
    }

    fn observe(&self, observation: Observation) {
        match self.observations.try_send(observation) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => {
                self.metrics.observation_dropped();
            }
        }
    }
}

/// Writes observations in batches; ends when nobody can observe any more.
async fn write(store: Store, mut observed: mpsc::Receiver<Observation>) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    while observed.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let written = store
            .run_patiently(Observe(std::mem::take(&mut batch)))
            .await;
        if let Err(error) = written {
            tracing::warn!(%error, "observations of experiments were lost");
        }
    }
}

/// The task that keeps the pointer true.
struct Keeper {
    campaigns: Campaigns,
    store: Store,
    settings: Settings,
    /// The file's text that was looked at last.
    seen: Option<Digest>,
    /// Since when the active revision serves.
    since_ms: i64,
}

impl Keeper {
    async fn run(mut self) {
        let mut assessed = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(LOOK).await;
            let mut outcome = self.look().await;
            if outcome.is_ok() && assessed.elapsed() >= self.settings.assess_every {
                assessed = tokio::time::Instant::now();
                outcome = self.assess().await;
            }
            match outcome {
                Ok(()) => {}
                Err(StoreError::Closed) => return,
                Err(error) => tracing::warn!(%error, "campaigns could not be looked after"),
            }
        }
    }

    /// Takes over the file if it changed, and the pointer if somebody moved it.
    async fn look(&mut self) -> Result<(), StoreError> {
        if let Some(path) = self.settings.file.clone() {
            self.read_file(&path).await?;
        }
        self.follow_pointer().await
    }

    async fn read_file(&mut self, path: &Path) -> Result<(), StoreError> {
        let text = match read(path).await {
            Ok(text) => text,
            Err(error) => {
                if self.seen.take().is_some() {
                    self.campaigns.metrics.campaign_rejected();
                    tracing::error!(path = %path.display(), %error, "the campaign file cannot be read");
                }
                return Ok(());
            }
        };
        let digest = Campaign::digest(&text);
        if self.seen == Some(digest) {
            return Ok(());
        }
        self.seen = Some(digest);
        if let Err(error) = Campaign::parse(&text) {
            self.campaigns.metrics.campaign_rejected();
            tracing::error!(path = %path.display(), %error, "the campaign file is refused; what was in force stays");
            return Ok(());
        }
        match self.store.run_patiently(Publish { body: text }).await? {
            Ok(revision) => tracing::info!(revision, "a campaign is in force"),
            Err(crate::experiment::revision::Rejected::Active(_)) => {}
            Err(rejected) => {
                self.campaigns.metrics.campaign_rejected();
                tracing::error!(path = %path.display(), reason = %rejected, "the campaign file is refused; what was in force stays");
            }
        }
        Ok(())
    }

    async fn follow_pointer(&mut self) -> Result<(), StoreError> {
        let (revision, text) = self
            .store
            .read(|connection| campaign::active(connection))
            .await?;
        let before = self.campaigns.active();
        if revision == before.revision {
            return Ok(());
        }
        // Checked before it was published; a later version may refuse what an older took.
        let campaign = match Campaign::parse(&text) {
            Ok(campaign) => campaign,
            Err(error) => {
                tracing::error!(revision, %error, "the stored campaign cannot be used");
                return Ok(());
            }
        };
        let runs = campaign
            .experiments
            .iter()
            .map(|experiment| (experiment.name.clone(), experiment.salt.clone()))
            .collect();
        self.store.run_patiently(Begin(runs)).await?;
        let decided = self.decided(&campaign).await?;
        self.since_ms = unix_time_ms();
        self.put(Active {
            revision,
            campaign,
            decided,
        });
        Ok(())
    }

    async fn decided(&self, campaign: &Campaign) -> Result<BTreeMap<String, String>, StoreError> {
        let experiments = campaign.experiments.clone();
        self.store
            .read(move |connection| {
                let mut decided = BTreeMap::new();
                for experiment in experiments {
                    let run = campaign::run(connection, &experiment)?;
                    if let Some(variant) = run.and_then(|run| run.variant) {
                        decided.insert(experiment.name, variant);
                    }
                }
                Ok(decided)
            })
            .await
    }

    fn put(&self, active: Active) {
        self.campaigns.metrics.campaign_active(active.revision);
        let mut pointer = self
            .campaigns
            .active
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *pointer = Arc::new(active);
    }

    /// Decides what can be decided, and rolls back what does harm.
    async fn assess(&mut self) -> Result<(), StoreError> {
        let active = self.campaigns.active();
        let findings = findings(&self.store, &active).await?;
        let mut is_harmful = None;
        for finding in &findings {
            self.campaigns.metrics.experiment_assessed(finding);
            let verdict = &finding.assessment.verdict;
            let experiment = active.campaign.experiment(&finding.name);
            let Some(experiment) = experiment.filter(|_| finding.is_open()) else {
                continue;
            };
            let at = match verdict {
                Verdict::Wait | Verdict::Mismatch => continue,
                Verdict::Ship(at) => *at,
                Verdict::Keep | Verdict::RollBack(_) => 0,
            };
            if let Verdict::RollBack(harmful) = verdict {
                let variant = finding.variants.get(*harmful).cloned().unwrap_or_default();
                is_harmful = Some(format!("{}={variant} does harm", experiment.name));
            }
            let variant = finding.variants.get(at).cloned().unwrap_or_default();
            tracing::info!(
                experiment = experiment.name,
                verdict = verdict.as_str(),
                variant,
                "an experiment is decided"
            );
            let decide = Decide {
                name: experiment.name.clone(),
                salt: experiment.salt.clone(),
                verdict: verdict.as_str(),
                variant,
            };
            self.store.run_patiently(decide).await?;
        }
        if let Some(reason) = is_harmful {
            return self.roll_back(&active, reason).await;
        }
        let served_ms = unix_time_ms().saturating_sub(self.since_ms);
        let good_ms = i64::try_from(self.settings.good_after.as_millis()).unwrap_or(i64::MAX);
        if active.revision > 0 && served_ms >= good_ms {
            let approve = Judge {
                revision: active.revision,
                standing: Standing::Good,
                reason: String::new(),
            };
            self.store.run_patiently(approve).await?;
        }
        self.put(Active {
            decided: self.decided(&active.campaign).await?,
            ..Active::clone(&active)
        });
        Ok(())
    }

    async fn roll_back(&mut self, active: &Active, reason: String) -> Result<(), StoreError> {
        tracing::error!(
            revision = active.revision,
            reason,
            "a campaign is rolled back"
        );
        let judge = Judge {
            revision: active.revision,
            standing: Standing::RolledBack,
            reason,
        };
        self.store.run_patiently(judge).await?;
        self.campaigns.metrics.campaign_rolled_back();
        self.follow_pointer().await
    }
}

async fn read(path: &Path) -> std::io::Result<String> {
    let length = tokio::fs::metadata(path).await?.len();
    if usize::try_from(length).map_or(true, |length| length > TEXT_BYTES_MAX) {
        return Err(std::io::Error::other("more than 1 MiB"));
    }
    tokio::fs::read_to_string(path).await
}

/// What is known of one experiment now.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The experiment.
    pub name: String,
    /// Its variants, control first.
    pub variants: Vec<String>,
    /// What was counted, by variant.
    pub samples: Vec<Sample>,
    /// What follows.
    pub assessment: Assessment,
    /// The stored verdict, `running` until there is one.
    pub stored: String,
    /// When it began.
    pub started_at_ms: i64,
}

impl Finding {
    /// Whether it still can be decided.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.stored == "running"
    }
}

/// Counts and assesses every active experiment.
///
/// # Errors
/// [`StoreError`]
pub async fn findings(store: &Store, active: &Active) -> Result<Vec<Finding>, StoreError> {
    let experiments = active.campaign.experiments.clone();
    let now_ms = unix_time_ms();
    store
        .read(move |connection| {
            let mut findings = Vec::with_capacity(experiments.len());
            for experiment in experiments {
                let Some(run) = campaign::run(connection, &experiment)? else {
                    continue;
                };
                let samples = campaign::samples(connection, &experiment)?;
                let elapsed_ms = now_ms.saturating_sub(run.started_at_ms);
                findings.push(Finding {
                    assessment: assess(&experiment, &samples, elapsed_ms),
                    variants: experiment
                        .variants
                        .into_iter()
                        .map(|variant| variant.name)
                        .collect(),
                    name: experiment.name,
                    samples,
                    stored: run.verdict,
                    started_at_ms: run.started_at_ms,
                });
            }
            Ok(findings)
        })
        .await
}
