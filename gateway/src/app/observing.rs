//! The kernel side, in two steps: what changes nothing for anybody, and what takes effect.

use std::sync::Arc;

use anyhow::Context as _;

use super::kernel_endpoints;
use crate::{
    attribution::{Claims, Watermarks},
    class::{ClassId, Classes},
    config::{Attach, Cidr, Config, KernelLog, Observe},
    kernel::{AttachMode, Kernel, Observer, ObserverThread, Options, Selection, Watch},
    ledger::Ledger,
    owner::Owners,
    proxy::{
        generation::{Generation, Names},
        meter::Meter,
    },
    reload::Reloader,
    slots::Slots,
    upgrade::Predecessor,
};

/// Programs loaded over the pinned maps.
pub(super) struct Prepared {
    pub(super) kernel: Kernel,
    pub(super) slots: Arc<Slots>,
    pub(super) watch: Option<Watch>,
    pub(super) classes: Vec<(Cidr, ClassId)>,
    pub(super) meter: Meter,
    /// Once attached.
    pub(super) observers: Vec<ObserverThread>,
}

/// What the kernel side is made for and with.
pub(super) struct Site<'a> {
    pub(super) config: &'a Config,
    pub(super) ledger: &'a Ledger,
    pub(super) owners: &'a Arc<Owners>,
    pub(super) classes: &'a Classes,
    pub(super) claims: &'a Arc<Claims>,
}

impl Site<'_> {
    /// Loads, and attaches unless another process has to let go first; the inner error is why the
    /// gateway runs degraded.
    pub(super) fn prepare(
        &self,
        predecessor: Option<&mut Predecessor>,
    ) -> anyhow::Result<Result<Prepared, String>> {
        let meters = predecessor.as_ref().is_some_and(|other| other.meters());
        let Some(observe) = &self.config.observe else {
            anyhow::ensure!(
                !meters,
                "observe is disabled here, and the running gateway meters: stop it and start this \
                 one"
            );
            return Ok(Err(
                "observe is absent or disabled in the configuration".into()
            ));
        };
        let begun = match predecessor {
            Some(other) => self.load(observe, Some(other)),
            None => self.load(observe, None).and_then(|mut prepared| {
                self.attach(&mut prepared, false)?;
                Ok(prepared)
            }),
        };
        match begun {
            Ok(prepared) => Ok(Ok(prepared)),
            Err(error) if observe.required || meters => {
                Err(error.context("the kernel side is required and does not work"))
            }
            Err(error) => Ok(Err(format!("{error:#}"))),
        }
    }

    fn load(
        &self,
        observe: &Observe,
        predecessor: Option<&mut Predecessor>,
    ) -> anyhow::Result<Prepared> {
        let options = kernel_options(observe);
        let beside = predecessor.and_then(|other| {
            let lock = other.pins_lock.take();
            lock.map(|lock| (lock, other))
        });
        let (mut kernel, beside) = match beside {
            Some((lock, other)) => (Kernel::load_beside(&options, lock)?, Some(other)),
            None => (Kernel::load(&options)?, None),
        };
        for notice in &kernel.notices {
            log::warn!("{notice}");
        }
        let (socket_slots, flows) = (kernel.socket_slots.try_clone()?, kernel.flows.try_clone()?);
        let open = match &beside {
            Some(other) => {
                other.expect_epoch(&kernel.epoch)?;
                Slots::open_beside
            }
            None => {
                // Before the listeners are made: their accepted connections inherit whose they are.
                kernel.namespaces.begin()?;
                Slots::open
            }
        };
        let watch = Some(kernel.watch()?);
        let slots = open(&kernel.slots, socket_slots, flows, kernel.slots_len)
            .context("cannot map the connection slots")?;
        begin_epoch(&mut kernel, &slots, self.ledger, self.owners, self.classes)?;
        let classes = number_classes(self.config, self.classes)?;
        let meter = Meter::new(
            Some(Arc::clone(&slots)),
            Arc::clone(self.owners),
            Arc::clone(self.claims),
        );
        Ok(Prepared {
            kernel,
            slots,
            watch,
            classes,
            meter,
            observers: Vec::new(),
        })
    }

    /// Takes effect: classes, endpoints, programs on the interfaces, in place of another
    /// process's.
    fn attach(&self, prepared: &mut Prepared, beside: bool) -> anyhow::Result<()> {
        let Prepared {
            kernel,
            slots,
            classes,
            meter,
            observers,
            ..
        } = prepared;
        *observers = attach(self.config, kernel, slots, classes, meter, beside)?;
        Ok(())
    }
}

/// As above, once the other process has let go.
pub(super) fn attach_beside(
    config: &Config,
    kernel: &mut Kernel,
    slots: &Slots,
    classes: &[(Cidr, ClassId)],
    meter: &Meter,
) -> anyhow::Result<Vec<ObserverThread>> {
    attach(config, kernel, slots, classes, meter, true)
}

fn attach(
    config: &Config,
    kernel: &mut Kernel,
    slots: &Slots,
    classes: &[(Cidr, ClassId)],
    meter: &Meter,
    beside: bool,
) -> anyhow::Result<Vec<ObserverThread>> {
    let Some(observe) = &config.observe else {
        return Ok(Vec::new());
    };
    if beside {
        kernel.namespaces.begin()?;
    } else {
        // Beside another process the reloader does it, with that one's endpoints.
        // Numbers are the same however often they are asked for.
        let generation = Generation::first(config.clone(), meter)?;
        kernel
            .maps
            .set_endpoints(&kernel_endpoints(&generation, &Names::new()))?;
    }
    kernel.maps.set_classes(classes)?;
    let mode = match observe.attach {
        Attach::Auto => AttachMode::Auto,
        Attach::Tcx => AttachMode::Tcx,
        Attach::Clsact => AttachMode::Clsact,
    };
    let selection = selection(observe);
    let mut own = kernel.observer(selection.clone(), mode)?;
    own.begin()?;
    let names = Arc::clone(&kernel.names);
    slots.observe(Box::new(move || names.own_numbers()));
    let mut observers = vec![own.start().context("cannot follow interfaces")?];
    let named: Vec<&str> = observe.namespaces.iter().map(|n| n.name.as_str()).collect();
    kernel.keep_namespaces(&named)?;
    for namespace in &observe.namespaces {
        let place = (namespace.name.as_str(), namespace.path.as_path());
        let started = kernel
            .observer_in(&kernel_options(observe), place, selection.clone(), mode)
            .and_then(Observer::start_inside);
        match started {
            Ok(observer) => observers.push(observer),
            Err(error) if observe.required => return Err(error.into()),
            Err(error) => log::warn!("{error}; the other namespaces are observed"),
        }
    }
    Ok(observers)
}

/// Names the endpoints beside those of a process that drains.
pub(super) fn name_beside(reloader: &Reloader, drained: &Arc<()>) -> anyhow::Result<()> {
    reloader.inherit(drained);
    Ok(reloader.name_endpoints()?)
}

/// Ties the ledger to the kernel's counters before anything new is counted: what they held under
/// another ledger is not posted to this one, and the numbers they bear are not given again.
fn begin_epoch(
    kernel: &mut Kernel,
    slots: &Slots,
    ledger: &Ledger,
    owners: &Owners,
    classes: &Classes,
) -> anyhow::Result<()> {
    let reading = kernel.maps.read()?;
    let opening = Watermarks {
        accounts: reading.accounts,
        interfaces: reading.interfaces,
    };
    let used = opening != Watermarks::default();
    let begun = ledger.begin_epoch(&kernel.epoch, &opening)?;
    if begun && used {
        log::warn!(
            "the kernel's counters belong to another ledger: this one begins with what they gain \
             from now on"
        );
    }
    if let Some(journal) = kernel.journal.take() {
        owners.keep_in(Box::new(journal), begun)?;
    }
    let (owner, class) = kernel.maps.highest_numbers()?;
    owners.start_above(owner.max(slots.highest_owner()));
    classes.start_above(ClassId(class));
    Ok(())
}

/// Numbers the configured classes.
pub(super) fn number_classes(
    config: &Config,
    classes: &Classes,
) -> anyhow::Result<Vec<(Cidr, ClassId)>> {
    let mut prefixes = Vec::new();
    for class in &config.classes {
        let id = classes.intern(class.name.as_str())?;
        prefixes.extend(class.cidrs.iter().map(|cidr| (*cidr, id)));
    }
    Ok(prefixes)
}

/// What the configuration asks of the kernel side.
#[must_use]
pub fn kernel_options(observe: &Observe) -> Options {
    Options {
        bpffs: Some(observe.bpffs.clone()),
        flows_max: observe.flows_max,
        connections_max: observe.connections_max,
        accounts_max: observe.accounts_max,
        log_level: match observe.kernel_log {
            KernelLog::Off => 0,
            KernelLog::Error => 1,
            KernelLog::Warn => 2,
            KernelLog::Info => 3,
            KernelLog::Debug => 4,
        },
    }
}

/// Which interfaces the configuration asks for.
#[must_use]
pub fn selection(observe: &Observe) -> Selection {
    Selection {
        include: observe.interfaces.clone(),
        exclude: observe.exclude.clone(),
        boundary: observe.boundary.clone(),
    }
}
