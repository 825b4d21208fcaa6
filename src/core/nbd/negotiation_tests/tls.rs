//! STARTTLS: when it is granted, what it forgets, and what may not be said without it.

use super::*;

const POLICIES: [TlsPolicy; 3] = [TlsPolicy::Off, TlsPolicy::Optional, TlsPolicy::Required];
const REQD: u32 = rep::ERR_TLS_REQD;

fn opening(flags: u32, options: &[Vec<u8>]) -> Vec<u8> {
    let mut input = flags.to_be_bytes().to_vec();
    options.iter().for_each(|bytes| input.extend(bytes));
    input
}

/// Client flags and options, up to where STARTTLS is granted or the handshake ends otherwise.
fn begin(policy: TlsPolicy, options: &[Vec<u8>]) -> (Negotiation, Outcome) {
    let mut machine = Negotiation::with_tls(policy);
    let outcome = play_to(&mut machine, &opening(3, options), &[]);
    (machine, outcome)
}

/// A handshake in which TLS is running.
fn secured(policy: TlsPolicy, before: &[Vec<u8>]) -> Negotiation {
    let (machine, outcome) = begin(policy, &[before, &[option(opt::STARTTLS, &[])]].concat());
    assert_eq!(outcome.end, Some(Step::StartTls));
    assert_eq!(kinds(&outcome.output).last(), Some(&rep::ACK));
    machine
}

#[test]
fn starttls_is_granted_where_there_is_tls() {
    for policy in [TlsPolicy::Optional, TlsPolicy::Required] {
        for pieces in [&[][..], &[1], &[5, 7]] {
            let mut machine = Negotiation::with_tls(policy);
            let outcome = play_to(&mut machine, &opening(3, &[option(opt::STARTTLS, &[])]), pieces);
            assert_eq!(replies(&outcome.output), [(opt::STARTTLS, rep::ACK, vec![])]);
            assert_eq!(outcome.end, Some(Step::StartTls));
            let options = [option(opt::LIST, &[]), option(opt::GO, &info_data("a", &[]))].concat();
            let outcome = play_to(&mut machine, &options, pieces);
            assert_eq!(kinds(&outcome.output), [rep::SERVER, rep::SERVER, rep::ACK, rep::INFO, rep::ACK]);
            assert_eq!(entered(&outcome).size_bytes, 1 << 30);
        }
    }
}

#[test]
fn starttls_is_unknown_where_there_is_none() {
    let (_, outcome) = begin(TlsPolicy::Off, &[option(opt::STARTTLS, &[]), option(opt::GO, &info_data("a", &[]))]);
    assert_eq!(kinds(&outcome.output), [rep::ERR_UNSUP, rep::INFO, rep::ACK]);
    entered(&outcome);
}

#[test]
fn what_was_negotiated_before_tls_is_forgotten() {
    let before = [
        option(opt::EXTENDED_HEADERS, &[]),
        option(opt::SET_META_CONTEXT, &meta_data("a", &["base:allocation"])),
        option(opt::INFO, &info_data("a", &[])),
    ];
    let go = option(opt::GO, &info_data("a", &[]));
    let mut machine = secured(TlsPolicy::Optional, &before);
    let outcome = play_to(&mut machine, &go, &[]);
    let session = entered(&outcome);
    assert_eq!((session.style, session.contexts.len()), (ReplyStyle::Simple, 0));
    assert_eq!(session.flags & transmission::SEND_DF, 0);

    // EXTENDED_HEADERS would forbid EXPORT_NAME and a second negotiation of structured replies.
    let mut machine = secured(TlsPolicy::Optional, &before);
    let again = [option(opt::STRUCTURED_REPLY, &[]), option(opt::EXPORT_NAME, b"a")].concat();
    let outcome = play_to(&mut machine, &again, &[]);
    assert_eq!(entered(&outcome).style, ReplyStyle::Structured);
    // NO_ZEROES is a flag of the client's, which is not sent again.
    assert_eq!(outcome.output.len(), 20 + 10);
}

#[test]
fn bytes_behind_starttls_end_the_connection() {
    for policy in [TlsPolicy::Optional, TlsPolicy::Required] {
        for injected in [&b"\x16"[..], &option(opt::GO, &info_data("a", &[])), &option(opt::STARTTLS, &[])] {
            let mut input = opening(3, &[option(opt::STARTTLS, &[])]);
            input.extend(injected);
            let outcome = play_to(&mut Negotiation::with_tls(policy), &input, &[]);
            assert!(matches!(outcome.end, Some(Step::Close(CloseReason::Violation(_)))), "{:?}", outcome.end);
            assert!(outcome.output.is_empty(), "STARTTLS must not be granted");
        }
    }
}

#[test]
fn starttls_takes_no_data_and_no_second_time() {
    for policy in [TlsPolicy::Optional, TlsPolicy::Required] {
        let (mut machine, outcome) = begin(policy, &[option(opt::STARTTLS, &[7; 3000])]);
        assert_eq!((kinds(&outcome.output), &outcome.end), (vec![rep::ERR_INVALID], &None));
        // It can be asked again, properly.
        let outcome = play_to(&mut machine, &option(opt::STARTTLS, &[]), &[]);
        assert_eq!(outcome.end, Some(Step::StartTls));
        for data in [&[][..], &[1, 2, 3]] {
            let outcome = play_to(&mut machine, &option(opt::STARTTLS, data), &[]);
            assert_eq!((kinds(&outcome.output), outcome.end), (vec![rep::ERR_INVALID], None));
        }
        let outcome = play_to(&mut machine, &option(opt::GO, &info_data("a", &[])), &[]);
        entered(&outcome);
    }
}

#[test]
fn nothing_is_said_before_tls_where_it_is_required() {
    let options = [
        (option(opt::LIST, &[]), REQD),
        (option(opt::LIST, b"data"), REQD),
        (option(opt::INFO, &info_data("a", &[])), REQD),
        (option(opt::INFO, b"nonsense"), REQD),
        (option(opt::GO, &info_data("nobody", &[])), REQD),
        (option(opt::STRUCTURED_REPLY, &[]), REQD),
        (option(opt::EXTENDED_HEADERS, &[]), REQD),
        (option(opt::LIST_META_CONTEXT, &meta_data("a", &[])), REQD),
        (option(opt::SET_META_CONTEXT, &meta_data("a", &[])), REQD),
        (option(99, &[3; 70]), REQD),
    ];
    let (asked, expected): (Vec<_>, Vec<_>) = options.into_iter().unzip();
    let (mut machine, outcome) = begin(TlsPolicy::Required, &asked);
    assert_eq!((kinds(&outcome.output), outcome.end), (expected, None));
    let outcome = play_to(&mut machine, &option(opt::STARTTLS, &[]), &[]);
    assert_eq!(outcome.end, Some(Step::StartTls));
    // "The server MUST NOT send NBD_REP_ERR_TLS_REQD in reply to any option if TLS has already been initiated."
    let outcome = play_to(&mut machine, &asked[..9].concat(), &[]);
    assert!(!kinds(&outcome.output).contains(&REQD));

    let (_, outcome) = begin(TlsPolicy::Required, &[option(opt::ABORT, &[])]);
    assert_eq!((kinds(&outcome.output), outcome.end), (vec![rep::ACK], Some(Step::Close(CloseReason::Aborted))));
    let (_, outcome) = begin(TlsPolicy::Required, &[option(opt::EXPORT_NAME, b"a")]);
    assert_eq!((outcome.output.len(), outcome.end), (0, Some(Step::Close(CloseReason::TlsRequired))));
}

#[test]
fn optional_tls_never_insists() {
    let asked = [
        option(opt::LIST, &[]),
        option(opt::INFO, &info_data("nobody", &[])),
        option(opt::GO, &info_data("later", &[])),
        option(99, &[]),
        option(opt::GO, &info_data("a", &[])),
    ];
    let (_, outcome) = begin(TlsPolicy::Optional, &asked);
    assert!(!kinds(&outcome.output).contains(&REQD));
    entered(&outcome);
    let (_, outcome) = begin(TlsPolicy::Optional, &[option(opt::EXPORT_NAME, b"a")]);
    entered(&outcome);
}

#[test]
fn without_fixed_newstyle_there_is_no_tls() {
    // "The server MUST operate in NOTLS mode unless [...] the client replied with NBD_FLAG_C_FIXED_NEWSTYLE".
    for (policy, expected) in [(TlsPolicy::Off, None), (TlsPolicy::Optional, None)] {
        let input = opening(2, &[option(opt::STARTTLS, &[])]);
        let outcome = play_to(&mut Negotiation::with_tls(policy), &input, &[]);
        assert_eq!((kinds(&outcome.output), outcome.end), (vec![rep::ERR_UNSUP], expected));
    }
    let outcome = play_to(&mut Negotiation::with_tls(TlsPolicy::Required), &opening(2, &[]), &[]);
    assert_eq!(outcome.end, Some(Step::Close(CloseReason::TlsRequired)));
}

proptest! {
    /// However options are mixed and cut, nothing about an export leaves before TLS where it is required.
    #[test]
    fn required_tls_keeps_its_secrets(
        which in proptest::collection::vec((0u32..13, proptest::collection::vec(any::<u8>(), 0..40)), 0..12),
        pieces in proptest::collection::vec(1usize..50, 0..5),
    ) {
        let options: Vec<_> = which.iter().map(|(kind, data)| option(*kind, data)).collect();
        let outcome = play_to(&mut Negotiation::with_tls(TlsPolicy::Required), &opening(3, &options), &pieces);
        prop_assert!(!matches!(outcome.end, Some(Step::Enter(_))));
        for (kind, reply, _) in replies(&outcome.output) {
            let allowed = match kind {
                opt::STARTTLS => [rep::ACK, rep::ERR_INVALID],
                opt::ABORT => [rep::ACK; 2],
                _ => [REQD; 2],
            };
            prop_assert!(allowed.contains(&reply), "{kind} was answered {reply}");
        }
    }

    /// Pieces change nothing, whatever the policy; but what comes in one piece with STARTTLS is refused.
    #[test]
    fn tls_or_not_pieces_change_nothing(
        which in proptest::collection::vec((0u32..13, 0usize..20), 0..8),
        pieces in proptest::collection::vec(1usize..50, 1..5),
    ) {
        let options: Vec<_> = which
            .iter()
            .filter(|(kind, _)| *kind != opt::STARTTLS)
            .map(|(kind, len)| option(*kind, &vec![0; *len]))
            .collect();
        for policy in POLICIES {
            let input = opening(3, &options);
            let whole = play_to(&mut Negotiation::with_tls(policy), &input, &[]);
            let cut = play_to(&mut Negotiation::with_tls(policy), &input, &pieces);
            prop_assert_eq!(whole, cut);
        }
    }
}
