//! Bugs on purpose: each breaks one line that the product stands on, so that a test can show that the simulation (tests/sim) would
//! notice. Off, and nothing but a constant, without the feature `seeded-bugs`. Must not know what it breaks.

/// What can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it; the lines that ask for them show it
pub enum Bug {
    PresenceBeforeData,
    FlushWithoutResidency,
    RowsBeforeSync,
    FuaWithoutFlush,
    FailedRowsForgotten,
    FailedSyncForgotten,
    UnsyncedRowsSkipped,
    UnsyncedRowsBelievedAfterPowerLoss,
    FetchedOverGuests,
    SectorMaskIgnored,
    TornEdgesNotFilled,
    ResidueUnderZeros,
    FailureAsZeros,
    AnswerNotVerified,
    PromotionLost,
    PromotionLostAtSource,
    JoinLost,
    RetryForgotten,
    LostConnectionForgotten,
    ReadaheadWithoutBound,
    StaleIdAfterWrite,
    GateOpenBeforeOwnership,
    FenceDoesNotWait,
    CompleteBeforeSync,
    OpeningOutlivesRelease,
    RowsByName,
    RefusedWriteCounts,
    ImageByPath,
    UnsyncedHolesBelieved,
    WithdrawalForgotten,
    RefusalBelieved,
    AnswerBeforeJournal,
    AdmitBeforeJournal,
    GivenBackToAnybody,
    ReclaimWithinTheTerm,
    DebtForgotten,
    StaleFenceBelieved,
    UnknownAfterTheEnd,
    DoubtForgotten,
    TakenFromClients,
    LeftForgotten,
}

impl Bug {
    /// The simulation (tests/sim) has to notice them.
    pub const ALL: &[Bug] = &[
        Bug::PresenceBeforeData,
        Bug::FlushWithoutResidency,
        Bug::RowsBeforeSync,
        Bug::FuaWithoutFlush,
        Bug::FailedRowsForgotten,
        Bug::FailedSyncForgotten,
        Bug::UnsyncedRowsSkipped,
        Bug::UnsyncedRowsBelievedAfterPowerLoss,
        Bug::FetchedOverGuests,
        Bug::SectorMaskIgnored,
        Bug::TornEdgesNotFilled,
        Bug::ResidueUnderZeros,
        Bug::FailureAsZeros,
        Bug::AnswerNotVerified,
        Bug::PromotionLost,
        Bug::PromotionLostAtSource,
        Bug::JoinLost,
        Bug::RetryForgotten,
        Bug::LostConnectionForgotten,
        Bug::ReadaheadWithoutBound,
        Bug::StaleIdAfterWrite,
        Bug::GateOpenBeforeOwnership,
        Bug::FenceDoesNotWait,
        Bug::CompleteBeforeSync,
        Bug::OpeningOutlivesRelease,
        Bug::RowsByName,
        Bug::RefusedWriteCounts,
        Bug::ImageByPath,
        Bug::UnsyncedHolesBelieved,
    ];

    /// Those of the ownership machine: the model (tests/handover) has to notice them.
    pub const OF_OWNERSHIP: &[Bug] = &[
        Bug::WithdrawalForgotten,
        Bug::RefusalBelieved,
        Bug::AnswerBeforeJournal,
        Bug::AdmitBeforeJournal,
        Bug::GivenBackToAnybody,
        Bug::ReclaimWithinTheTerm,
        Bug::DebtForgotten,
        Bug::StaleFenceBelieved,
        Bug::UnknownAfterTheEnd,
        Bug::DoubtForgotten,
        Bug::TakenFromClients,
        Bug::LeftForgotten,
    ];
}

#[cfg(feature = "seeded-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug for everything that runs on this thread from now on; None: no bug.
#[cfg(feature = "seeded-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this thread suffers from it.
#[cfg(feature = "seeded-bugs")]
pub fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this thread suffers from it: without the feature, none does.
#[cfg(not(feature = "seeded-bugs"))]
#[inline(always)]
pub const fn is_planted(_bug: Bug) -> bool {
    false
}
