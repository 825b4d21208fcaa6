//! The command line of `fleet`. Must not know: how images are made.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;

use crate::error::FleetError;
use crate::fleet::{self, Contents, FleetOptions};
use crate::host::{self, Budget};
use crate::packages;
use crate::report::FILE_NAME;
use crate::units::parse_size;

/// Makes real, similar disk images without root: a template filled from Debian packages, and clones of it that have
/// lived.
#[derive(Debug, Parser)]
#[command(name = "fleet", version, after_help = "Example:\n  fleet --out /tmp/fleet --vms 3 --size 1GiB --seed 1")]
pub struct Cli {
    /// Where the images and fleet.json go
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How many clones of the template
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(0..=99))]
    pub vms: u16,
    /// The size of every image
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    pub size: u64,
    /// Decides everything that is left to chance
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where downloads and unpacked packages are kept [default: blockferry/fleet in the user's cache]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// How many MiB of its own each clone has, on top of its packages
    #[arg(long, value_name = "MIB", default_value_t = 32, value_parser = clap::value_parser!(u64).range(0..=65_536))]
    pub data_mb: u64,
    /// Fill the images from this machine's /usr; also done when packages cannot be had
    #[arg(long)]
    pub from_host: bool,
    /// Print fleet.json instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Makes the fleet and prints what there is. Progress goes to stderr.
///
/// # Errors
/// Any [`FleetError`]; its [`FleetError::exit_status`] is the program's.
pub fn run(cli: &Cli) -> Result<(), FleetError> {
    let started = Instant::now();
    let say = |line: &str| eprintln!("[{:4.0}s] {line}", started.elapsed().as_secs_f64());
    if !cli.size.is_multiple_of(4096) || cli.size < 64 << 20 {
        return Err(FleetError::Usage("--size must be a multiple of 4KiB and at least 64MiB".into()));
    }
    let cache = match &cli.cache {
        Some(dir) => dir.clone(),
        None => default_cache()?,
    };
    fs::create_dir_all(&cache).map_err(FleetError::file("create the directory", &cache))?;
    let cache = fs::canonicalize(&cache).map_err(FleetError::file("find", &cache))?;
    if cache.to_str().is_none_or(|path| path.contains(|c: char| c == '"' || c.is_control())) {
        return Err(FleetError::Usage("--cache: a path without quotes and control characters, please".into()));
    }
    let _lock = lock(&cache, &say)?;
    let contents = contents(cli, &cache, &say)?;
    let options = FleetOptions {
        out: cli.out.clone(),
        cache,
        vms: usize::from(cli.vms),
        size: cli.size,
        seed: cli.seed,
        data_bytes: cli.data_mb << 20,
    };
    let report = fleet::build(&options, &contents, &say)?;
    if cli.json {
        let json = serde_json::to_string_pretty(&report).map_err(|error| FleetError::File {
            action: "print",
            path: FILE_NAME.into(),
            source: error.into(),
        })?;
        println!("{json}");
    } else {
        print!("{}", report.table());
        println!("{} images in {} ({:.1} s)", report.images.len(), cli.out.display(), started.elapsed().as_secs_f64());
    }
    Ok(())
}

fn contents(cli: &Cli, cache: &Path, say: &(dyn Fn(&str) + Sync)) -> Result<Contents, FleetError> {
    let vms = usize::from(cli.vms);
    if !cli.from_host {
        if cli.size < packages::IMAGE_MIN_BYTES {
            let message = "--size: the packages need 1GiB; smaller images can be filled with --from-host";
            return Err(FleetError::Usage(message.into()));
        }
        match packages::contents(cache, vms, say) {
            Err(FleetError::Packages(reason)) => say(&format!("no packages ({reason}): taking parts of /usr instead")),
            other => return other,
        }
    }
    host::contents(Path::new("/usr"), cache, vms.clamp(1, 6), cli.seed, Budget::for_image(cli.size), say)
}

fn default_cache() -> Result<PathBuf, FleetError> {
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")));
    base.map(|base| base.join("blockferry/fleet"))
        .ok_or_else(|| FleetError::Usage("neither HOME nor XDG_CACHE_HOME is set: say --cache DIR".into()))
}

/// Two runs at once would unpack into the same trees.
fn lock(cache: &Path, say: &dyn Fn(&str)) -> Result<File, FleetError> {
    let path = cache.join("lock");
    let file = File::create(&path).map_err(FleetError::file("create", &path))?;
    if file.try_lock().is_err() {
        say("waiting for another run with the same cache");
        file.lock().map_err(FleetError::file("lock", &path))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from("fleet --out /x --vms 3 --size 1GiB --seed 1".split(' ')).unwrap();
        assert_eq!((cli.vms, cli.size, cli.data_mb), (3, 1 << 30, 32));
        for wrong in ["fleet", "fleet --out /x --size 1GB", "fleet --out /x --vms 100"] {
            assert!(Cli::try_parse_from(wrong.split(' ')).is_err(), "{wrong}");
        }
    }

    #[test]
    fn impossible_sizes_are_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        for (size, word) in [("63MiB", "64MiB"), ("67108865", "4KiB"), ("64MiB", "--from-host")] {
            let (out, cache) = (dir.path().join("out"), dir.path().join("cache"));
            let args = ["fleet", "--size", size, "--out"].map(PathBuf::from).into_iter();
            let args = args.chain([out.clone(), "--cache".into(), cache]);
            let error = run(&Cli::try_parse_from(args).unwrap()).unwrap_err();
            assert!(error.exit_status() == 2 && error.to_string().contains(word), "{error}");
            assert!(!out.exists());
        }
    }
}
