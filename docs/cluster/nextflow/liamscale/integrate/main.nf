process LIAMSCALE_INTEGRATE {
    tag "$meta.id"
    label 'process_high'

    conda "${moduleDir}/environment.yml"
    container "registry.example.org/liam-scale:cpu"

    input:
    tuple val(meta), path(h5mu)
    val batch_key

    output:
    tuple val(meta), path("${prefix}.h5mu"), emit: h5mu
    tuple val(meta), path("${prefix}_report"), emit: report
    path "versions.yml", emit: versions

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    prefix = task.ext.prefix ?: "${meta.id}_liam"
    """
    liam-scale ingest ${h5mu} --out store.zarr
    liam-scale train store.zarr ${args} --batch-key ${batch_key} --out run \\
        --loader.threads ${task.cpus}
    liam-scale embed run --store store.zarr
    liam-scale evaluate store.zarr --batch-key ${batch_key} --run run \\
        --out ${prefix}_report
    cp -L ${h5mu} ${prefix}.h5mu
    python -c "
    import liam_scale
    run = liam_scale.load_run('run', store='store.zarr')
    run.write_to('${prefix}.h5mu', overwrite=True)
    "

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        liam-scale: \$(liam-scale --version | sed 's/liam-scale //')
    END_VERSIONS
    """

    stub:
    prefix = task.ext.prefix ?: "${meta.id}_liam"
    """
    touch ${prefix}.h5mu
    mkdir ${prefix}_report

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        liam-scale: \$(liam-scale --version | sed 's/liam-scale //')
    END_VERSIONS
    """
}
