# Rscript seurat_wnn.R FOLDER SEED: weighted nearest neighbours of rna.mtx and adt.mtx or atac.mtx (features x cells);
# writes latent.csv, a row a cell, and version.txt. Options are those of Seurat's vignettes.
suppressMessages({
  library(Matrix)
  library(Seurat)
})
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]
set.seed(as.integer(arguments[2]))
counts <- function(name) {
  found <- as(readMM(file.path(folder, paste0(name, ".mtx"))), "CsparseMatrix")
  dimnames(found) <- list(paste0(name, "-", seq_len(nrow(found))), paste0("c", seq_len(ncol(found))))
  found
}
cells <- CreateSeuratObject(counts("rna"))
cells <- NormalizeData(cells, verbose = FALSE)
cells <- FindVariableFeatures(cells, verbose = FALSE)
cells <- ScaleData(cells, verbose = FALSE)
cells <- RunPCA(cells, npcs = 50, verbose = FALSE)
if (file.exists(file.path(folder, "adt.mtx"))) {
  cells[["second"]] <- CreateAssayObject(counts("adt"))
  DefaultAssay(cells) <- "second"
  VariableFeatures(cells) <- rownames(cells[["second"]])
  cells <- NormalizeData(cells, normalization.method = "CLR", margin = 2, verbose = FALSE)
  cells <- ScaleData(cells, verbose = FALSE)
  cells <- RunPCA(cells, reduction.name = "apca", reduction.key = "APC_", npcs = 30, verbose = FALSE)
  dims <- list(1:30, 1:18)
} else {  # latent semantic indexing as Signac has it, which Debian lacks; its first component is depth
  peaks <- counts("atac")
  peaks <- peaks[rowSums(peaks) > 0, ]
  cells[["second"]] <- CreateAssayObject(peaks)
  frequencies <- Diagonal(x = ncol(peaks) / rowSums(peaks)) %*% peaks %*% Diagonal(x = 1 / pmax(colSums(peaks), 1))
  parts <- irlba::irlba(t(log1p(frequencies * 1e4)), nv = 50)
  lsi <- scale(parts$u %*% diag(parts$d))
  dimnames(lsi) <- list(colnames(cells), paste0("LSI_", seq_len(ncol(lsi))))
  cells[["apca"]] <- CreateDimReducObject(lsi, key = "LSI_", assay = "second")
  dims <- list(1:50, 2:50)
}
cells <- FindMultiModalNeighbors(cells, reduction.list = list("pca", "apca"), dims.list = dims, verbose = FALSE)
cells <- RunSPCA(cells, assay = "RNA", graph = "wsnn", npcs = 20, verbose = FALSE)
write.csv(Embeddings(cells, "spca"), file.path(folder, "latent.csv"))
writeLines(as.character(packageVersion("Seurat")), file.path(folder, "version.txt"))
