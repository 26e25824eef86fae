//! Fusing adapters while a model generates.
//!
//! | | |
//! |---|---|
//! | [`Selector`] | at each layer, each token keeps what the adapter does that changes it most (arXiv 2602.15539) |
//! | [`Schedule`] | which adapter at which layer and step, computed beforehand (K-LoRA, EST-LoRA, CRAFT-LoRA) |
//! | [`guide`] | asymmetric guidance: the unconditional pass knows no adapter (CRAFT-LoRA) |
//! | [`LiveNpLora`] | merged factors that follow a slider |
//! | [`Refiner`] | latents pushed toward reference features |
//!
//! All of it runs in buffers of the host's device, recorded into the host's command encoder where nothing of the
//! host comes in between, and has an f64 twin on the CPU. `docs/embedding.md` shows a host.

mod guidance;
mod live;
mod refine;
mod schedule;
mod selection;

pub use self::guidance::{guide, guide_host};
pub use self::live::{Factors, LiveNpLora};
pub use self::refine::{Encoder, Objective, Outcome, Ramp, Refiner, RefinerOptions, Values, ValuesMut};
pub use self::schedule::{
    Balance, EstOptions, KLoraOptions, Schedule, ScheduleAdapter, ScheduledLayer, Window, craft, est, k_lora,
};
pub use self::selection::{Choice, Decision, Scope, Selection, Selector, SelectorOptions, Tokens};
pub use crate::compute::ops::Score;
