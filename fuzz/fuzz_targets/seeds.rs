//! Writes the seeds of every target into `corpus/TARGET/`.

fn main() -> std::io::Result<()> {
    for target in coar_lab::fuzzing::TARGETS {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (number, seed) in coar_lab::fuzzing::seeds(target.name).iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
